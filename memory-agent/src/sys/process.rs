//! Asking for another process's memory.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::without_provenance_mut;

use rustix::io::Errno;

use super::last_error;
use crate::page_state::PAGE_SIZE;

/// Ranges that one call takes (`UIO_MAXIOV`).
const MOST_RANGES: usize = 1024;

fn range_of(addresses: &Range<u64>) -> libc::iovec {
    libc::iovec {
        iov_base: without_provenance_mut(addresses.start as usize),
        iov_len: (addresses.end - addresses.start) as usize,
    }
}

/// Asks the kernel to page out what a process maps at these addresses (`process_madvise` with `MADV_PAGEOUT`, mm/madvise.c).
/// It may go through less than all: returns how many bytes.
pub(crate) fn page_out(process: BorrowedFd<'_>, ranges: &[Range<u64>]) -> rustix::io::Result<usize> {
    let ranges: Vec<_> = ranges.iter().take(MOST_RANGES).map(range_of).collect();
    let (advice, flags) = (libc::MADV_PAGEOUT, 0_u32);
    // SAFETY: the kernel reads `ranges.len()` live iovecs and takes the addresses in them as the other process's, where
    // this advice never changes what memory reads as.
    let done = unsafe {
        libc::syscall(libc::SYS_process_madvise, process.as_raw_fd(), ranges.as_ptr(), ranges.len(), advice, flags)
    };
    usize::try_from(done).map_err(|_| last_error())
}

/// Whether the kernel has `process_madvise` and lets this process use it.
pub(crate) fn has_process_madvise() -> bool {
    let (no_process, no_ranges, flags) = (-1, 0, 0);
    // SAFETY: there is no such process, and with no ranges nothing is read from the pointer.
    super::was_understood(unsafe {
        let ranges = std::ptr::null::<libc::iovec>();
        libc::syscall(libc::SYS_process_madvise, no_process, ranges, no_ranges, libc::MADV_PAGEOUT, flags)
    })
}

/// Has a process's own page tables map the pages at these addresses, by reading a byte of each (`process_vm_readv`,
/// mm/process_vm_access.c). What is swapped is swapped in, and holes are allocated.
pub(crate) fn map_pages(pid: u32, addresses: &Range<u64>) -> rustix::io::Result<()> {
    let pages: Vec<u64> = addresses.clone().step_by(PAGE_SIZE as usize).collect();
    for pages in pages.chunks(MOST_RANGES) {
        let there: Vec<_> = pages.iter().map(|page| range_of(&(*page..page + 1))).collect();
        let mut bytes = vec![0_u8; pages.len()];
        let here = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: `here` describes `bytes`, which is exclusively ours and as long as all the ranges there together; the
        // addresses of those are the other process's.
        let read = unsafe {
            libc::process_vm_readv(
                pid.cast_signed(),
                &raw const here,
                1,
                there.as_ptr(),
                there.len() as libc::c_ulong,
                0,
            )
        };
        match usize::try_from(read) {
            Ok(read) if read == pages.len() => {}
            Ok(_) => return Err(Errno::FAULT),
            Err(_) => return Err(last_error()),
        }
    }
    Ok(())
}
