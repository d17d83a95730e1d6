//! Questions to the kernel that no crate asks. None of them changes memory or what it reads as.
#![allow(unsafe_code, reason = "system calls and ioctls that no crate offers")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

/// `UFFD_USER_MODE_ONLY` (include/uapi/linux/userfaultfd.h): no faults of the kernel, and thus none of a vCPU.
const USER_MODE_ONLY: u32 = 1;

/// `USERFAULTFD_IOC_NEW`, an `_IO` that takes the flags by value.
const USERFAULTFD_IOC_NEW: libc::c_ulong = opcode::none(0xaa, 0) as libc::c_ulong;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// The error of the last `libc` call.
fn last_error() -> Errno {
    std::io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

/// `userfaultfd(2)`, for faults of the kernel too or not.
pub(super) fn userfaultfd(kernel_faults: bool) -> rustix::io::Result<OwnedFd> {
    let scope = if kernel_faults { 0 } else { USER_MODE_ONLY };
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | UserfaultfdFlags::from_bits_retain(scope);
    // SAFETY: no memory is ever registered with the descriptor, so that it can do nothing to any.
    unsafe { rustix::mm::userfaultfd(flags) }
}

/// The same from an open `/dev/userfaultfd`, which is for faults of the kernel too.
pub(super) fn userfaultfd_of(device: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    // SAFETY: the ioctl takes a number and no pointer; no memory is ever registered with what it makes.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(last_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `UFFDIO_API`: the features that the kernel has. Once a descriptor.
pub(super) fn userfault_features(fd: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    const UFFDIO_API: u32 = opcode::read_write::<UffdioApi>(0xaa, 0x3f);
    let mut api = UffdioApi { api: 0xaa, features: 0, ioctls: 0 };
    // SAFETY: the number carries the size of this very structure, which has the layout the kernel declares and for
    // which any bits are valid.
    unsafe { ioctl(fd, Updater::<UFFDIO_API, _>::new(&mut api)) }?;
    Ok(api.features)
}

/// A run of pages of the same categories (`struct page_region`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PageRegion {
    /// First address.
    pub(super) start: u64,
    /// First address behind.
    pub(super) end: u64,
    /// Those of the categories asked for that its pages are in.
    pub(super) categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct PmScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    inverted: u64,
    mask: u64,
    any_of: u64,
    returned: u64,
}

/// `PAGEMAP_SCAN` (fs/proc/task_mmu.c, Linux 6.7) on an open `/proc/PID/pagemap`: the runs of pages of the address
/// range that are in any of the categories, as far as `regions` holds them.
pub(super) fn pagemap_scan(
    pagemap: impl AsFd,
    range: std::ops::Range<u64>,
    categories: u64,
    regions: &mut [PageRegion],
) -> rustix::io::Result<&[PageRegion]> {
    const PAGEMAP_SCAN: u32 = opcode::read_write::<PmScan>(b'f', 16);
    let mut scan = PmScan {
        size: size_of::<PmScan>() as u64,
        start: range.start,
        end: range.end,
        regions: regions.as_mut_ptr().expose_provenance() as u64,
        regions_len: regions.len() as u64,
        any_of: categories,
        returned: categories,
        ..PmScan::default()
    };
    // SAFETY: the kernel writes at most `regions_len` regions, all of whose bits are valid, to memory that is
    // exclusively ours, and `walk_end` of the structure; with no flags it changes nothing else.
    let count = unsafe { libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN as libc::c_ulong, &raw mut scan) };
    if count < 0 {
        return Err(last_error());
    }
    regions.get(..count as usize).ok_or(Errno::OVERFLOW)
}

/// Whether a call that was asked about a descriptor that is none was understood at all. Kernels without it, and seccomp
/// filters that hide it, say otherwise.
fn was_understood(result: libc::c_long) -> bool {
    result >= 0 || !matches!(last_error(), Errno::NOSYS | Errno::PERM)
}

/// Whether the kernel has `cachestat(2)` and lets this process use it.
pub(super) fn has_cachestat() -> bool {
    // The libc crate lacks the number for glibc.
    const SYS_CACHESTAT: libc::c_long = 451;
    // SAFETY: there is no such descriptor, and the kernel refuses null pointers; it can write nothing.
    was_understood(unsafe { libc::syscall(SYS_CACHESTAT, -1, ptr::null::<u8>(), ptr::null_mut::<u8>(), 0) })
}

/// Whether the kernel has `process_madvise(2)` and lets this process use it.
pub(super) fn has_process_madvise() -> bool {
    let (no_process, no_ranges, flags) = (-1, 0, 0);
    // SAFETY: there is no such process, and with no ranges nothing is read from the pointer.
    was_understood(unsafe {
        let ranges = ptr::null::<libc::iovec>();
        libc::syscall(libc::SYS_process_madvise, no_process, ranges, no_ranges, libc::MADV_PAGEOUT, flags)
    })
}
