//! Which pages nobody has touched for a while: idle page tracking
//! (Documentation/admin-guide/mm/idle_page_tracking.rst).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memory_agent::{PAGE_SIZE, PageRanges, ProcessMemory, Target, TargetError};
use thiserror::Error;

/// One bit a page frame of the host, in words of 64.
const BITMAP: &str = "/sys/kernel/mm/page_idle/bitmap";
/// An entry of `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): the page is in memory, and where.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
/// Entries, or words of the bitmap, that one call reads or writes.
const BATCH: usize = 1 << 13;

/// Why nobody knows which pages are idle.
#[derive(Debug, Error)]
pub(super) enum IdleError {
    /// The kernel was built without.
    #[error(
        "this kernel cannot tell which pages were touched: it needs CONFIG_IDLE_PAGE_TRACKING; give --range or --all"
    )]
    NotHere,
    /// The user may not ask.
    #[error("this user may not ask which pages were touched: run as root, with CAP_SYS_ADMIN")]
    NoRight,
    /// The memory is not what it was.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A file could not be read or written.
    #[error("cannot {what}: {cause}; check that /proc and /sys are mounted")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        cause: io::Error,
    },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> IdleError {
    move |cause| match cause.kind() {
        io::ErrorKind::PermissionDenied => IdleError::NoRight,
        _ => IdleError::Io { what, cause },
    }
}

/// The pages of a process's memory that are watched for being touched.
///
/// Only pages that the process maps are; of a huge page only its first part counts as idle, because the kernel keeps one
/// bit for all of it. Pages that cannot be watched are taken for touched.
#[derive(Debug)]
pub(super) struct Watched {
    bitmap: IdleBitmap,
    /// Page and page frame.
    frames: Vec<(u64, u64)>,
}

impl Watched {
    /// Marks every page as idle that the process maps; whoever touches one from now on takes its mark away.
    ///
    /// # Errors
    /// When this kernel has no such marks, or this user may not use them.
    pub(super) fn begin(memory: &ProcessMemory) -> Result<Self, IdleError> {
        let bitmap = IdleBitmap::open(Path::new(BITMAP))?;
        let frames = frames(memory)?;
        bitmap.mark(frames.iter().map(|(_, frame)| *frame))?;
        Ok(Self { bitmap, frames })
    }

    /// The pages that still have their marks, in order.
    ///
    /// # Errors
    /// When the process has gone, or the kernel does not tell.
    pub(super) fn idle(self, memory: &ProcessMemory) -> Result<PageRanges, IdleError> {
        // A page that is elsewhere now was moved, or freed and read again.
        let now: BTreeMap<u64, u64> = frames(memory)?.into_iter().collect();
        let stayed: Vec<_> = self.frames.into_iter().filter(|(page, frame)| now.get(page) == Some(frame)).collect();
        let idle = self.bitmap.marked(stayed.iter().map(|(_, frame)| *frame))?;
        let mut ranges = PageRanges::new();
        for (page, _) in stayed.iter().filter(|(_, frame)| is_marked(&idle, *frame)) {
            ranges.push(*page..page + 1);
        }
        Ok(ranges)
    }
}

/// The pages of a memory that are mapped, and their page frames.
fn frames(memory: &ProcessMemory) -> Result<Vec<(u64, u64)>, IdleError> {
    let path = format!("/proc/{}/pagemap", memory.process().pid());
    let pagemap = File::open(path).map_err(io_error("open the page tables"))?;
    let pages = memory.mapping().pages();
    let mut frames = Vec::new();
    let mut bytes = vec![0; BATCH * 8];
    let mut page = 0;
    while page < pages {
        let bytes = &mut bytes[..(pages - page).min(BATCH as u64) as usize * 8];
        let entry = memory.address() / PAGE_SIZE + page;
        pagemap.read_exact_at(bytes, entry * 8).map_err(io_error("read the page tables"))?;
        let mapped = frames_of(bytes).ok_or(IdleError::NoRight)?;
        frames.extend(mapped.into_iter().map(|(index, frame)| (page + index, frame)));
        page += bytes.len() as u64 / 8;
    }
    // What was opened by number was that process's, and it still maps the memory there.
    memory.check()?;
    Ok(frames)
}

/// Index and page frame of each entry that is in memory; `None` when the kernel hides the frames.
fn frames_of(bytes: &[u8]) -> Option<Vec<(u64, u64)>> {
    let (entries, _) = bytes.as_chunks::<8>();
    let present = (0..).zip(entries.iter().map(|entry| u64::from_ne_bytes(*entry)));
    let present = present.filter(|(_, entry)| entry & PRESENT != 0);
    present.map(|(index, entry)| (entry & FRAME != 0).then_some((index, entry & FRAME))).collect()
}

/// Words of the bitmap by their numbers.
type Words = BTreeMap<u64, u64>;

fn is_marked(words: &Words, frame: u64) -> bool {
    words.get(&(frame / 64)).is_some_and(|word| word & (1 << (frame % 64)) != 0)
}

/// The words that have the frames' bits, with these bits set.
fn words_of(frames: impl Iterator<Item = u64>) -> Words {
    let mut words = Words::new();
    for frame in frames {
        *words.entry(frame / 64).or_default() |= 1 << (frame % 64);
    }
    words
}

/// The words in runs of consecutive numbers, none longer than [`BATCH`]: the first number, and the words.
fn runs_of(words: &Words) -> Vec<(u64, Vec<u64>)> {
    let mut runs: Vec<(u64, Vec<u64>)> = Vec::new();
    for (number, word) in words {
        match runs.last_mut() {
            Some((first, run)) if *first + run.len() as u64 == *number && run.len() < BATCH => run.push(*word),
            _ => runs.push((*number, vec![*word])),
        }
    }
    runs
}

/// The kernel's marks. It takes the 1 bits of what is written and leaves all others as they are
/// (mm/page_idle.c `page_idle_bitmap_write`).
#[derive(Debug)]
struct IdleBitmap(File);

impl IdleBitmap {
    fn open(path: &Path) -> Result<Self, IdleError> {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => Ok(Self(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(IdleError::NotHere),
            Err(e) => Err(io_error("open the kernel's marks of idle pages")(e)),
        }
    }

    fn mark(&self, frames: impl Iterator<Item = u64>) -> Result<(), IdleError> {
        for (first, run) in runs_of(&words_of(frames)) {
            let bytes: Vec<u8> = run.iter().flat_map(|word| word.to_ne_bytes()).collect();
            transfer(bytes.len(), |done| self.0.write_at(&bytes[done..], first * 8 + done as u64))
                .map_err(io_error("mark pages as idle"))?;
        }
        Ok(())
    }

    /// The words of these frames as they are now.
    fn marked(&self, frames: impl Iterator<Item = u64>) -> Result<Words, IdleError> {
        let mut words = Words::new();
        for (first, run) in runs_of(&words_of(frames)) {
            let mut bytes = vec![0; run.len() * 8];
            transfer(run.len() * 8, |done| self.0.read_at(&mut bytes[done..], first * 8 + done as u64))
                .map_err(io_error("read which pages are idle"))?;
            let (read, _) = bytes.as_chunks::<8>();
            words.extend((first..).zip(read.iter().map(|word| u64::from_ne_bytes(*word))));
        }
        Ok(words)
    }
}

/// Reads or writes so many bytes, or up to where nothing more goes: where the host's memory ends in the middle of a word, the
/// kernel does not count that word (mm/page_idle.c). Its pages are never taken for idle.
fn transfer(length: usize, mut part: impl FnMut(usize) -> io::Result<usize>) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        match part(done) {
            Ok(0) => break,
            Ok(some) => done += some,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_the_kernel_does_not_count_has_no_idle_pages() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[0xff; 64 * 8], 0).unwrap();
        let bitmap = IdleBitmap::open(file.path()).unwrap();
        let idle = bitmap.marked([63 * 64, 64 * 64, 64 * 64 + 9].into_iter()).unwrap();
        assert!(is_marked(&idle, 63 * 64) && !is_marked(&idle, 64 * 64) && !is_marked(&idle, 64 * 64 + 9));
    }

    #[test]
    fn a_bit_is_where_the_kernel_has_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 * 8).unwrap();
        let bitmap = IdleBitmap::open(file.path()).unwrap();
        let frames = [0, 63, 64, 130, 131, 64 * 50 + 7];
        bitmap.mark(frames.into_iter()).unwrap();
        let word = |number: u64| {
            let mut bytes = [0; 8];
            file.as_file().read_exact_at(&mut bytes, number * 8).unwrap();
            u64::from_ne_bytes(bytes)
        };
        assert_eq!((word(0), word(1), word(2)), (1 << 63 | 1, 1, 0b1100));
        assert_eq!((word(3), word(50), word(51)), (0, 1 << 7, 0));

        // Somebody touches one page.
        file.as_file().write_all_at(&0b1000_u64.to_ne_bytes(), 2 * 8).unwrap();
        let idle = bitmap.marked(frames.into_iter()).unwrap();
        let still: Vec<_> = frames.into_iter().filter(|frame| is_marked(&idle, *frame)).collect();
        assert_eq!(still, [0, 63, 64, 131, 64 * 50 + 7]);
        assert!(!is_marked(&idle, 1) && !is_marked(&idle, 64 * 60));
    }

    #[test]
    fn words_that_follow_one_another_are_one_call() {
        let runs = runs_of(&words_of([640, 1, 70, 650, 64 * 3].into_iter()));
        assert_eq!(runs, [(0, vec![0b10, 1 << 6]), (3, vec![1]), (10, vec![1 | 1 << 10])]);
        let many = runs_of(&words_of((0..BATCH as u64 + 5).map(|word| word * 64)));
        assert_eq!(many.iter().map(|(first, run)| (*first, run.len())).collect::<Vec<_>>(), [(0, BATCH), (8192, 5)]);
    }

    #[test]
    fn page_tables_tell_frames_or_hide_them() {
        let bytes = |entries: &[u64]| entries.iter().flat_map(|entry| entry.to_ne_bytes()).collect::<Vec<u8>>();
        // In memory; a swap entry; nothing; in memory, with other bits set.
        let entries = [PRESENT | 0x1234, 1 << 62 | 99, 0, PRESENT | 1 << 55 | 1 << 61 | 7];
        assert_eq!(frames_of(&bytes(&entries)), Some(vec![(0, 0x1234), (3, 7)]));
        assert_eq!(frames_of(&bytes(&[PRESENT])), None);
        assert_eq!(frames_of(&bytes(&[0, 1 << 62])), Some(vec![]));
    }

    #[test]
    fn a_kernel_without_marks_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(IdleBitmap::open(&folder.path().join("bitmap")), Err(IdleError::NotHere)));
    }
}
