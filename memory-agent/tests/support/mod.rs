//! A memfd whose pages the tests control, and the swap they need.
#![allow(unsafe_code, reason = "maps memory and asks the kernel about it, page by page")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]
#![allow(dead_code, reason = "each test file uses what it needs")]

pub(crate) mod disk;
pub(crate) mod group;
pub(crate) mod hints;
pub(crate) mod history;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use harness::disturbance::{damon_is_on, swap_of_others};
use harness::host::{may_be_used, skip};
use memory_agent::{KernelOffer, Mapping, PAGE_SIZE, PageState, Residency, ScopedZram};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fstat, memfd_create};
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of swap that the tests of one process share.
const SWAP_BYTES: u64 = 1 << 30;

/// The tool: one that was built elsewhere where `MEMORY_AGENT_BIN` names it.
pub(crate) fn tool() -> Command {
    Command::new(std::env::var_os("MEMORY_AGENT_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_memory-agent").into()))
}

/// Whether what waits in the swap cache can be told here; says in a line that `test` is skipped where it cannot.
pub(crate) fn tells_swap_cache(test: &str) -> bool {
    let tells = KernelOffer::of_this_host().cachestat;
    if !tells {
        eprintln!(
            "skipped {test}: this kernel has no cachestat (Linux 6.5 has), and what waits in the swap cache looks resident"
        );
    }
    tells
}

/// Runs a test alone in this process, with swap, or says in a line why it is skipped where there cannot be any.
///
/// Swap is the host's: pages go to any device, and when another process ends its own, the kernel brings in all pages
/// that are there. DAMON, where it is on, pages out by itself. So a test that fails while either may have been is repeated.
pub(crate) fn with_swap(test: &str, body: impl Fn()) {
    let zram = match shared_zram() {
        Ok(zram) => zram,
        Err(why) => return skip(test, why),
    };
    undisturbed(test, &zram.path(), body);
}

/// Runs a test whose swap this device is alone in this process, and again when it fails while others page out or have swap
/// of their own.
pub(crate) fn undisturbed(test: &str, own: &Path, body: impl Fn()) {
    const ATTEMPTS: u32 = 6;
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let disturbed = || damon_is_on() || !swap_of_others(Some(own)).is_empty();
    for attempt in 1.. {
        let before = disturbed();
        let Err(failure) = catch_unwind(AssertUnwindSafe(&body)) else { return };
        if attempt == ATTEMPTS || !before && !disturbed() {
            resume_unwind(failure);
        }
        eprintln!("{test} is repeated: others on this host page out or have swap of their own");
    }
}

/// Whether memory files get huge pages without asking for them (Documentation/admin-guide/mm/transhuge.rst).
pub(crate) fn huge_pages() -> bool {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    enabled.is_ok_and(|text| ["[always]", "[within_size]", "[force]"].iter().any(|on| text.contains(on)))
}

/// The device that all tests of this process share; it is gone with the last of them.
fn shared_zram() -> Result<Arc<ScopedZram>, String> {
    static ZRAM: Mutex<Weak<ScopedZram>> = Mutex::new(Weak::new());
    let mut shared = ZRAM.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(zram) = shared.upgrade() {
        return Ok(zram);
    }
    may_be_used()?;
    let zram = Arc::new(ScopedZram::new(SWAP_BYTES).map_err(|e| e.to_string())?);
    *shared = Arc::downgrade(&zram);
    Ok(zram)
}

/// A shared memory file, mapped here; holes at first.
pub(crate) struct Memory {
    pub(crate) file: File,
    base: *mut u64,
    pub(crate) pages: u64,
}

// SAFETY: pages are only accessed by volatile reads and writes of whole words, and the tests give each page to one
// thread at a time.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

const WORDS: usize = PAGE_SIZE as usize / 8;

/// The bytes of a page that holds `stamp`.
pub(crate) fn page_with(stamp: u64) -> Vec<u8> {
    (0..WORDS).flat_map(|i| word(stamp, i).to_ne_bytes()).collect()
}

/// The content of a page with this stamp: hard to compress, and zeros for 0.
fn word(stamp: u64, index: usize) -> u64 {
    stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(index as u32) ^ if stamp == 0 { 0 } else { index as u64 }
}

impl Memory {
    pub(crate) fn new(name: &str, pages: u64) -> Self {
        let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(pages * PAGE_SIZE).unwrap();
        Self::of_file(file, pages)
    }

    /// Maps a file that has so many pages.
    pub(crate) fn of_file(file: File, pages: u64) -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let length = (pages * PAGE_SIZE) as usize;
        // SAFETY: a new mapping at a place of the kernel's choice, unmapped by drop only.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), length, protection, MapFlags::SHARED | MapFlags::NORESERVE, &file, 0)
        };
        Self { file, base: base.unwrap().cast(), pages }
    }

    pub(crate) fn mapping(&self) -> Mapping<'_> {
        Mapping::new(self.file.as_fd(), 0, self.base.addr(), self.pages * PAGE_SIZE).unwrap()
    }

    /// The same mapping, without a descriptor of its file: an empty one takes its place.
    pub(crate) fn without_file(mut self) -> Self {
        self.file = File::from(memfd_create("empty", MemfdFlags::CLOEXEC).unwrap());
        self
    }

    fn at(&self, page: u64, index: usize) -> *mut u64 {
        assert!(page < self.pages && index < WORDS);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.add(page as usize * WORDS + index) }
    }

    /// Writes through the mapping.
    pub(crate) fn write(&self, page: u64, stamp: u64) {
        // SAFETY: `at` gives addresses in our mapping.
        (0..WORDS).for_each(|i| unsafe { self.at(page, i).write_volatile(word(stamp, i)) });
    }

    /// Writes without the mapping.
    pub(crate) fn pwrite(&self, page: u64, stamp: u64) {
        self.file.write_all_at(&page_with(stamp), page * PAGE_SIZE).unwrap();
    }

    /// Reads through the mapping: whether the page holds `stamp`.
    pub(crate) fn holds(&self, page: u64, stamp: u64) -> bool {
        // SAFETY: `at` gives addresses in our mapping.
        (0..WORDS).all(|i| unsafe { self.at(page, i).read_volatile() } == word(stamp, i))
    }

    /// The same without the mapping.
    pub(crate) fn pread_holds(&self, page: u64, stamp: u64) -> bool {
        let mut bytes = [0; PAGE_SIZE as usize];
        self.file.read_exact_at(&mut bytes, page * PAGE_SIZE).unwrap();
        let words = bytes.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().unwrap()));
        words.enumerate().all(|(i, found)| found == word(stamp, i))
    }

    /// Maps the file somewhere else; what was mapped before is gone, and this may not be used any more.
    pub(crate) fn move_elsewhere(&self) {
        let length = (self.pages * PAGE_SIZE) as usize;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice; then the old one goes, which nothing refers to.
        unsafe {
            rustix::mm::mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, &self.file, 0).unwrap();
            rustix::mm::munmap(self.base.cast(), length).unwrap();
        }
    }

    pub(crate) fn punch(&self, page: u64, pages: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, page * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
    }

    pub(crate) fn fallocate(&self, page: u64, pages: u64) {
        fallocate(&self.file, FallocateFlags::empty(), page * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
    }

    pub(crate) fn allocated_pages(&self) -> u64 {
        fstat(&self.file).unwrap().st_blocks as u64 * 512 / PAGE_SIZE
    }

    /// The states of all pages, and an answer that was given while nothing moved: the kernel goes on writing and freeing
    /// pages for a while after it was asked to.
    pub(crate) fn at_rest<T>(&self, ask: impl Fn() -> T) -> (Residency, T) {
        for _ in 0..50 {
            let before = self.truth();
            let answer = ask();
            if self.truth() == before {
                return (before, answer);
            }
        }
        panic!("pages do not come to rest, or asking moves them");
    }

    /// The states of all pages, each found out by a call or two of its own.
    pub(crate) fn truth(&self) -> Residency {
        let mut truth = Residency::default();
        for page in 0..self.pages {
            let offset = (page * PAGE_SIZE) as i64;
            // SAFETY: moves the offset of a file of ours that nobody uses.
            let data = unsafe { libc::lseek(self.file.as_raw_fd(), offset, libc::SEEK_DATA) } == offset;
            let mut resident = 0_u8;
            // SAFETY: writes one byte for the one page asked about.
            let result = unsafe { libc::mincore(self.at(page, 0).cast(), PAGE_SIZE as usize, &raw mut resident) };
            assert_eq!(result, 0);
            truth.push(
                1,
                match (data, resident & 1) {
                    (false, _) => PageState::Hole,
                    (true, 0) => PageState::Swapped,
                    (true, _) => PageState::Resident,
                },
            );
        }
        truth
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`, which nothing refers to any more.
        unsafe { rustix::mm::munmap(self.base.cast(), (self.pages * PAGE_SIZE) as usize) }.unwrap();
    }
}

/// A mapping for reading alone, of the first pages of a file.
pub(crate) struct ReadOnly {
    base: *mut std::ffi::c_void,
    pages: u64,
}

impl ReadOnly {
    pub(crate) fn new(file: &File, pages: u64) -> Self {
        let length = (pages * PAGE_SIZE) as usize;
        // SAFETY: a new mapping at a place of the kernel's choice, unmapped by drop only.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), length, ProtFlags::READ, MapFlags::SHARED, file, 0) };
        Self { base: base.unwrap(), pages }
    }

    pub(crate) fn address(&self) -> usize {
        self.base.addr()
    }

    /// What `mincore` says of a page.
    pub(crate) fn is_in_memory(&self, page: u64) -> bool {
        assert!(page < self.pages);
        let mut resident = 0_u8;
        // SAFETY: within the mapping; writes one byte for the one page asked about.
        let result = unsafe {
            libc::mincore(self.base.byte_add((page * PAGE_SIZE) as usize), PAGE_SIZE as usize, &raw mut resident)
        };
        assert_eq!(result, 0);
        resident & 1 == 1
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`, which nothing refers to any more.
        unsafe { rustix::mm::munmap(self.base, (self.pages * PAGE_SIZE) as usize) }.unwrap();
    }
}

/// Numbers that look random and are the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}
