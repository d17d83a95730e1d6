//! Asynchronous write protection by userfaultfd: the kernel lifts it by itself at the first write.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::ioctl::opcode;
use rustix::mm::UserfaultfdFlags;

use super::last_error;

/// `UFFD_USER_MODE_ONLY` (include/uapi/linux/userfaultfd.h): no messages about faults of the kernel. With protection
/// that the kernel lifts by itself there are no messages at all.
const USER_MODE_ONLY: u32 = 1;
const UFFD_API: u64 = 0xaa;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` (5.19): a protected page of shared memory that is unmapped leaves a marker.
pub(crate) const WP_SHMEM: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_ASYNC` (6.7).
pub(crate) const WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// A userfaultfd, ready to be asked for nothing but the features wanted.
pub(crate) fn open(features: u64) -> rustix::io::Result<OwnedFd> {
    const UFFDIO_API: u32 = opcode::read_write::<UffdioApi>(0xaa, 0x3f);
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: memory is registered below only, for a mode in which nothing waits for an answer.
    let fd = unsafe { rustix::mm::userfaultfd(flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY)) }?;
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    ioctl(fd.as_fd(), UFFDIO_API, &mut api)?;
    Ok(fd)
}

/// The same with the features that the kernel has: [`open`] with one it lacks fails.
pub(crate) fn features() -> rustix::io::Result<u64> {
    const UFFDIO_API: u32 = opcode::read_write::<UffdioApi>(0xaa, 0x3f);
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    // SAFETY: no memory is ever registered with this one.
    let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
    let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
    ioctl(fd.as_fd(), UFFDIO_API, &mut api)?;
    Ok(api.features)
}

/// Registers addresses of this process for write protection; closing the descriptor ends it.
pub(crate) fn register_write_protection(fd: BorrowedFd<'_>, addresses: &Range<u64>) -> rustix::io::Result<()> {
    const UFFDIO_REGISTER: u32 = opcode::read_write::<UffdioRegister>(0xaa, 0x00);
    let mut register = UffdioRegister {
        start: addresses.start,
        len: addresses.end - addresses.start,
        mode: REGISTER_MODE_WP,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_REGISTER, &mut register)
}

/// An ioctl of userfaultfd, which reads and writes one structure.
fn ioctl<T>(fd: BorrowedFd<'_>, number: u32, argument: &mut T) -> rustix::io::Result<()> {
    // SAFETY: both callers pass the structure whose size the number carries, in the layout the kernel declares, and any
    // bits are valid for it. Registering memory for asynchronous write protection never makes an access wait.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(number), std::ptr::from_mut(argument)) };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}
