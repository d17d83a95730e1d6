//! userfaultfd: asynchronous write protection, which the kernel lifts by itself at the first write, and faults on pages that
//! are not there, which wait until somebody has filled them in.

use std::fs::OpenOptions;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
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
/// `UFFD_FEATURE_MISSING_SHMEM` (4.11): faults on holes of shared memory are told of.
pub(crate) const MISSING_SHMEM: u64 = 1 << 5;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 1 << 1;
/// `USERFAULTFD_IOC_NEW`, an `_IO` that takes the flags by value.
const USERFAULTFD_IOC_NEW: libc::c_ulong = opcode::none(0xaa, 0) as libc::c_ulong;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;

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

/// A userfaultfd that hears of faults of the kernel too, such as those of vCPUs: by the system call where this user may, or
/// by `/dev/userfaultfd` (fs/userfaultfd.c `userfaultfd_syscall_allowed`).
pub(crate) fn open_for_kernel_faults(features: u64) -> std::io::Result<OwnedFd> {
    const UFFDIO_API: u32 = opcode::read_write::<UffdioApi>(0xaa, 0x3f);
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: faults on memory that is registered below wait until it is filled or unregistered, or the descriptor is
    // closed; none is ever told something wrong.
    let fd = match unsafe { rustix::mm::userfaultfd(flags) } {
        Err(Errno::PERM) => {
            let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
            // SAFETY: the ioctl takes a number and no pointer.
            let fd =
                unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
            unsafe { OwnedFd::from_raw_fd(fd) }
        }
        fd => fd?,
    };
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    ioctl(fd.as_fd(), UFFDIO_API, &mut api)?;
    Ok(fd)
}

/// Registers addresses of this process: whoever touches what is not there waits.
pub(crate) fn register_missing(fd: BorrowedFd<'_>, addresses: &Range<u64>) -> rustix::io::Result<()> {
    register(fd, addresses, REGISTER_MODE_MISSING)
}

/// Ends that; whoever waits goes on, and finds a hole.
pub(crate) fn unregister(fd: BorrowedFd<'_>, addresses: &Range<u64>) -> rustix::io::Result<()> {
    const UFFDIO_UNREGISTER: u32 = opcode::read::<UffdioRange>(0xaa, 0x01);
    ioctl(fd, UFFDIO_UNREGISTER, &mut UffdioRange::of(addresses))
}

/// Whoever waits for these addresses looks again.
pub(crate) fn wake(fd: BorrowedFd<'_>, addresses: &Range<u64>) -> rustix::io::Result<()> {
    const UFFDIO_WAKE: u32 = opcode::read::<UffdioRange>(0xaa, 0x02);
    ioctl(fd, UFFDIO_WAKE, &mut UffdioRange::of(addresses))
}

/// Fills a hole with zeros and wakes whoever waits for it; `EXIST` when it is none.
pub(crate) fn zero(fd: BorrowedFd<'_>, addresses: &Range<u64>) -> rustix::io::Result<()> {
    const UFFDIO_ZEROPAGE: u32 = opcode::read_write::<UffdioZeropage>(0xaa, 0x04);
    ioctl(fd, UFFDIO_ZEROPAGE, &mut UffdioZeropage { range: UffdioRange::of(addresses), mode: 0, zeroed: 0 })
}

/// Fills holes with `bytes`, whole pages, and maps them for whoever waits for them, who is woken. The kernel stops at the first
/// that it cannot fill, and says `EXIST` where one is none; with the error comes how many bytes it has copied before.
pub(crate) fn copy(fd: BorrowedFd<'_>, addresses: &Range<u64>, bytes: &[u8]) -> Result<(), (u64, Errno)> {
    const UFFDIO_COPY: u32 = opcode::read_write::<UffdioCopy>(0xaa, 0x03);
    assert_eq!(addresses.end - addresses.start, bytes.len() as u64, "the kernel reads as much as it writes");
    let (source, length) = (bytes.as_ptr() as u64, bytes.len() as u64);
    let mut copy = UffdioCopy { destination: addresses.start, source, length, mode: 0, copied: 0 };
    // What it says to have copied is an error's number when it is negative.
    ioctl(fd, UFFDIO_COPY, &mut copy).map_err(|e| (u64::try_from(copy.copied).unwrap_or(0), e))
}

/// Reads what has come and gives the addresses of faults to `each`; nothing when nothing has come.
pub(crate) fn read_faults(fd: BorrowedFd<'_>, mut each: impl FnMut(u64)) -> rustix::io::Result<()> {
    // `struct uffd_msg`: event (1 byte), 7 reserved, flags (8 bytes), address (8 bytes), 8 more.
    let mut messages = [[0_u8; 32]; 64];
    let length = match rustix::io::read(fd, messages.as_flattened_mut()) {
        Err(Errno::AGAIN) => 0,
        read => read?,
    };
    for message in messages.iter().take(length / 32).filter(|message| message[0] == EVENT_PAGEFAULT) {
        let mut address = [0; 8];
        address.copy_from_slice(&message[16..24]);
        each(u64::from_ne_bytes(address));
    }
    Ok(())
}

/// `struct uffdio_range`.
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

impl UffdioRange {
    fn of(addresses: &Range<u64>) -> Self {
        Self { start: addresses.start, len: addresses.end - addresses.start }
    }
}

/// `struct uffdio_copy`.
#[repr(C)]
struct UffdioCopy {
    destination: u64,
    source: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeroed: i64,
}

/// Registers addresses of this process for write protection; closing the descriptor ends it.
pub(crate) fn register_write_protection(fd: BorrowedFd<'_>, addresses: &Range<u64>) -> rustix::io::Result<()> {
    register(fd, addresses, REGISTER_MODE_WP)
}

fn register(fd: BorrowedFd<'_>, addresses: &Range<u64>, mode: u64) -> rustix::io::Result<()> {
    const UFFDIO_REGISTER: u32 = opcode::read_write::<UffdioRegister>(0xaa, 0x00);
    let length = addresses.end - addresses.start;
    ioctl(fd, UFFDIO_REGISTER, &mut UffdioRegister { start: addresses.start, len: length, mode, ioctls: 0 })
}

/// An ioctl of userfaultfd, which reads and writes one structure.
fn ioctl<T>(fd: BorrowedFd<'_>, number: u32, argument: &mut T) -> rustix::io::Result<()> {
    // SAFETY: all callers pass the structure whose size the number carries, in the layout the kernel declares, and any
    // bits are valid for it. What the calls do to memory is to fill holes that were registered, which nobody reads before;
    // what a copy reads is a slice, of the length that it is told.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(number), std::ptr::from_mut(argument)) };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}
