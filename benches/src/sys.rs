//! System calls that no crate offers.
#![allow(unsafe_code, reason = "a system call that takes addresses")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::without_provenance_mut;

/// Asks the kernel to page out a range of another process's memory (`process_madvise` with `MADV_PAGEOUT`); how many
/// bytes it went through. That pages left memory is not said: look. Needs CAP_SYS_NICE and the right to trace.
pub(crate) fn page_out(process: BorrowedFd<'_>, address: usize, length: usize) -> io::Result<usize> {
    let range = libc::iovec { iov_base: without_provenance_mut(address), iov_len: length };
    // SAFETY: the kernel reads one iovec, which is live, and takes the address in it as one of the other process, where
    // this advice never changes what memory reads as; the descriptor is borrowed, thus open.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_raw_fd(),
            &raw const range,
            1_usize,
            libc::MADV_PAGEOUT,
            0_u32,
        )
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}
