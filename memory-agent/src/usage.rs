//! Counting pages without walking them one by one.

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};

use rustix::fs::fstat;
use thiserror::Error;

use crate::memory::Mapping;
use crate::page_state::{Counts, PAGE_SIZE};
use crate::probe::{ProbeError, exact_probe};
use crate::sys::SharedMap;

/// Bytes of `/proc/self/smaps` read at a time: less than the text for one mapping, so that the kernel does not
/// walk the next one's page tables as well.
const PIECE: usize = 256;

/// Why pages could not be counted.
#[derive(Debug, Error)]
pub enum UsageError {
    /// A file or a system call failed.
    #[error("cannot {what}: {cause}; check that /proc is mounted and that the file is still open")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        cause: io::Error,
    },
    /// `/proc/self/smaps` does not tell.
    #[error("/proc/self/smaps does not tell what is swapped: use a kernel with CONFIG_PROC_PAGE_MONITOR")]
    Untold,
    /// The pages could not be asked about one by one.
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> UsageError {
    move |cause| UsageError::System { what, cause }
}

/// How many pages of the mapping are in each state, for sampling often.
///
/// If the mapping is of the whole file, the cost does not depend on its size: the file's blocks are what is not a
/// hole, and for a mapping of a whole shared memory file `smaps` has the file's own count of swapped pages (mm/shmem.c
/// `shmem_swap_usage`). It is read for a second, untouched mapping made at the lowest free address, where it comes
/// first, so that no page tables are walked to get there: 25 us for 1 GiB, where `cachestat` takes 30 ms with three
/// quarters of it swapped. In a program that is not position-independent the tables of lower mappings are walked,
/// some 5 ns a mapped page. Differs from [`exact_probe`] in that pages in the swap
/// cache count as swapped, allocated but unwritten ones as resident, and that the two numbers are not
/// read at the same moment.
///
/// For a part of a file, [`exact_probe`] is asked.
///
/// # Errors
/// [`UsageError`] when the kernel does not tell.
pub fn counts_of(mapping: &Mapping<'_>) -> Result<Counts, UsageError> {
    let stat = fstat(mapping.fd()).map_err(|e| system("examine the file")(e.into()))?;
    if mapping.offset(0) != 0 || mapping.length() != stat.st_size as u64 {
        return Ok(exact_probe().residency(mapping, 0..mapping.pages())?.counts());
    }
    let swapped = swapped_in_file(mapping)?;
    let stat = fstat(mapping.fd()).map_err(|e| system("examine the file")(e.into()))?;
    // Blocks are of 512 bytes whatever the file system.
    let data = (stat.st_blocks as u64 * 512 / PAGE_SIZE).min(mapping.pages());
    let swapped = swapped.min(data);
    Ok(Counts { hole: mapping.pages() - data, resident: data - swapped, swapped })
}

/// Swapped pages of the whole file.
fn swapped_in_file(mapping: &Mapping<'_>) -> Result<u64, UsageError> {
    // One at a time: two could not both be at the lowest address.
    static LOWEST: Mutex<()> = Mutex::new(());
    let _lowest = LOWEST.lock().unwrap_or_else(PoisonError::into_inner);
    let view = SharedMap::lowest(mapping.fd(), mapping.length() as usize).map_err(system("map the file"))?;
    let smaps = File::open("/proc/self/smaps").map_err(system("open /proc/self/smaps"))?;
    swapped_of(smaps, view.address()).map(|bytes| bytes / PAGE_SIZE)
}

/// The bytes that `smaps` says are swapped of the mapping that starts at `address`.
fn swapped_of(mut smaps: impl Read, address: usize) -> Result<u64, UsageError> {
    let header = format!("{address:08x}-");
    let mut text = String::new();
    let mut piece = [0; PIECE];
    let mut found = false;
    loop {
        let length = smaps.read(&mut piece).map_err(system("read /proc/self/smaps"))?;
        if length == 0 {
            return Err(UsageError::Untold);
        }
        text.push_str(&String::from_utf8_lossy(&piece[..length]));
        while let Some(end) = text.find('\n') {
            let line: String = text.drain(..=end).collect();
            found = found || line.starts_with(&header);
            if let Some(swap) = line.strip_prefix("Swap:").filter(|_| found) {
                let kib = swap.trim().strip_suffix(" kB").and_then(|kib| kib.trim().parse::<u64>().ok());
                return kib.map(|kib| kib * 1024).ok_or(UsageError::Untold);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_line_of_its_mapping() {
        let text = "00010000-00020000 r--s 0 /x\nRss: 0 kB\nSwap:   12 kB\nSwapPss: 1 kB\n\
                    00030000-00040000 r--s 0 /memfd:a (deleted)\nSwap:  8 kB\n";
        assert_eq!(swapped_of(text.as_bytes(), 0x10000).unwrap(), 12 * 1024);
        assert_eq!(swapped_of(text.as_bytes(), 0x30000).unwrap(), 8 * 1024);
        assert!(matches!(swapped_of(text.as_bytes(), 0x20000), Err(UsageError::Untold)));
        assert!(matches!(swapped_of(&b"00010000-\nSwap: x kB\n"[..], 0x10000), Err(UsageError::Untold)));
    }
}
