//! System calls on memory, made safe: none of these reads or writes the pages they are about.
#![allow(unsafe_code, reason = "system calls that take addresses")]

mod map;
pub(crate) mod pagemap;
pub(crate) mod pins;
pub(crate) mod process;
pub(crate) mod uffd;

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::without_provenance_mut;

use rustix::io::Errno;
use rustix::mm::Advice;

use crate::page_state::PAGE_SIZE;
pub(crate) use map::SharedMap;

/// The error of the last call made through libc.
fn last_error() -> Errno {
    io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

/// `MADV_PAGEOUT`: asks the kernel to page out what is mapped in the range (mm/madvise.c `madvise_pageout`).
pub(crate) fn page_out(address: usize, length: usize) -> rustix::io::Result<()> {
    // SAFETY: this advice never changes what memory reads as, so no reference anywhere is invalidated; the
    // kernel refuses ranges that are not mapped.
    unsafe { rustix::mm::madvise(address_of(address), length, Advice::LinuxPageOut) }
}

/// `MADV_POPULATE_READ`: maps pages as reads would, without reading (mm/madvise.c `madvise_populate`).
pub(crate) fn populate_read(address: usize, length: usize) -> rustix::io::Result<()> {
    // SAFETY: this fills page tables as a read access would and never changes what memory reads as.
    unsafe { rustix::mm::madvise(address_of(address), length, Advice::LinuxPopulateRead) }
}

/// `MADV_NOHUGEPAGE`: faults on the range, and khugepaged, make no huge pages of it. Writes through the file may.
pub(crate) fn no_huge_pages(address: usize, length: usize) -> rustix::io::Result<()> {
    // SAFETY: this never changes what memory reads as; the kernel refuses ranges that are not mapped.
    match unsafe { rustix::mm::madvise(address_of(address), length, Advice::LinuxNoHugepage) } {
        // A kernel that has no huge pages does not know the advice.
        Err(Errno::INVAL) => Ok(()),
        done => done,
    }
}

fn address_of(address: usize) -> *mut c_void {
    without_provenance_mut(address)
}

/// `mincore`: sets the lowest bit of `resident[i]` when page `i` from `address` on is in memory
/// (mm/mincore.c). `resident.len()` is the number of pages asked for.
pub(crate) fn mincore(address: usize, page_size: usize, resident: &mut [u8]) -> io::Result<()> {
    // SAFETY: the kernel writes one byte a page of the range, which is resident.len() bytes, into a buffer
    // that is exclusively ours; the range itself is only looked up.
    let result = unsafe { libc::mincore(address_of(address), resident.len() * page_size, resident.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether `mincore` tells this user the truth about a file, which must be open for reading: to whoever may not write it the
/// kernel calls every page resident (mm/mincore.c `can_do_mincore`), also one so far behind the end that there is none.
pub(crate) fn tells_residency(fd: BorrowedFd<'_>) -> io::Result<bool> {
    const FAR: u64 = (i64::MAX as u64 / PAGE_SIZE - 16) * PAGE_SIZE;
    let map = SharedMap::far(fd, PAGE_SIZE as usize, FAR)?;
    let mut resident = [0];
    mincore(map.address(), PAGE_SIZE as usize, &mut resident)?;
    Ok(resident[0] & 1 == 0)
}

/// The number of `cachestat`, the same on every architecture but alpha; the libc crate lacks it for glibc.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

/// Pages of a file range, counted (include/uapi/linux/mman.h `struct cachestat`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cachestat {
    pub(crate) cache: u64,
    pub(crate) dirty: u64,
    pub(crate) writeback: u64,
    /// For shared memory: pages with a swap entry, those still in the swap cache included.
    pub(crate) evicted: u64,
    pub(crate) recently_evicted: u64,
}

/// `cachestat` (mm/filemap.c, Linux 6.5): counts the pages of a range of bytes; `None` on older kernels and
/// where a seccomp filter hides the call.
pub(crate) fn cachestat(fd: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<Option<Cachestat>> {
    let range = CachestatRange { offset, length };
    let mut counts = Cachestat::default();
    // SAFETY: both pointers are to live values of the layout the kernel declares, counts is exclusively ours and
    // any bits make five u64, and the descriptor is borrowed, thus open; the kernel only writes to `counts`.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), &raw const range, &raw mut counts, 0) };
    if result == 0 {
        return Ok(Some(counts));
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(None),
        e => Err(e),
    }
}

/// Whether a call that was asked about a descriptor that is none was understood at all. Kernels without it, and seccomp
/// filters that hide it, say otherwise.
fn was_understood(result: libc::c_long) -> bool {
    result >= 0 || !matches!(last_error(), Errno::NOSYS | Errno::PERM)
}

/// Whether the kernel has `cachestat` and lets this process use it.
pub(crate) fn has_cachestat() -> bool {
    let nothing = std::ptr::null::<u8>();
    // SAFETY: there is no such descriptor, and the kernel refuses null pointers; it can write nothing.
    was_understood(unsafe { libc::syscall(SYS_CACHESTAT, -1, nothing, nothing, 0) })
}

/// The calling thread runs only when no other has anything to do (`SCHED_IDLE`, sched(7)).
pub(crate) fn run_when_idle() -> io::Result<()> {
    schedule(0, libc::SCHED_IDLE)
}

/// A thread of this process runs as threads do that nobody has said anything of.
pub(crate) fn run_as_others_do(thread: i32) -> io::Result<()> {
    schedule(thread, libc::SCHED_OTHER)
}

/// The scheduling policy of a thread, 0 being the calling one.
fn schedule(thread: i32, policy: i32) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the live structure.
    let result = unsafe { libc::sched_setscheduler(thread, policy, &raw const parameters) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Moves the pages that every CPU holds back in its batches on to the kernel's LRU lists, from where they can be
/// paged out. Nothing offers this by itself; moving *no* pages between NUMA nodes does it first
/// (mm/migrate.c `do_pages_move`, `lru_cache_disable`), and needs no rights. Costs some 300 us.
pub(crate) fn drain_lru_batches() -> io::Result<()> {
    let nothing = [0_usize; 1];
    let (this_process, no_pages, flag_move) = (0, 0, 2);
    // SAFETY: with a count of no pages the kernel reads and writes none of the three arrays, which are valid for
    // one element all the same.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            this_process,
            no_pages,
            nothing.as_ptr(),
            nothing.as_ptr(),
            nothing.as_ptr(),
            flag_move,
        )
    };
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
