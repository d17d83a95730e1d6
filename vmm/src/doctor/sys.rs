//! Questions to the kernel that no crate asks. None of them changes memory or what it reads as.
#![allow(unsafe_code, reason = "system calls and ioctls that no crate offers")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
