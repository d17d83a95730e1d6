//! The calls of a tap that no crate offers: its ioctls, and frames straight between it and guest RAM.
#![allow(unsafe_code, reason = "ioctls of tun(4), and readv and writev of memory that the guest writes meanwhile")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::ram::GuestRam;

/// Most parts of one call (`UIO_MAXIOV`).
const MAX_PARTS: usize = 1024;
/// `SIOCGIFMTU` (include/uapi/linux/sockios.h).
const SIOCGIFMTU: libc::c_ulong = 0x8921;
/// Space for a name of an interface, with a zero behind it.
const NAME: usize = libc::IFNAMSIZ;

/// `struct ifreq`, as these calls use it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME],
    /// `ifr_flags`, 16 bits, or `ifr_mtu`, 32 bits.
    value: [u8; 4],
    rest: [u8; 20],
}

impl InterfaceRequest {
    fn new(name: &str, value: [u8; 4]) -> io::Result<Self> {
        let mut request = Self { name: [0; NAME], value, rest: [0; 20] };
        if name.len() >= NAME {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn of_flags(name: &str, flags: i32) -> io::Result<Self> {
        let [low, high] = (flags as u16).to_ne_bytes();
        Self::new(name, [low, high, 0, 0])
    }

    fn name(&self) -> String {
        let bytes = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }
}

fn result(value: libc::c_int) -> io::Result<()> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An ioctl that reads or writes a whole `struct ifreq`.
fn with_request(fd: BorrowedFd<'_>, number: libc::c_ulong, request: &mut InterfaceRequest) -> io::Result<()> {
    // SAFETY: the calls that this is used for take a pointer to a `struct ifreq`, of which this has the layout and the size, and in
    // which any bits are valid.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(request)) })
}

/// Makes an open `/dev/net/tun` a queue of the tap of this name. Where there is none, one is made: ask before.
pub(super) fn set_interface(tun: BorrowedFd<'_>, name: &str, flags: i32) -> io::Result<()> {
    with_request(tun, libc::TUNSETIFF, &mut InterfaceRequest::of_flags(name, flags)?)
}

/// Name and flags of the interface whose queue this is.
pub(super) fn interface(queue: BorrowedFd<'_>) -> io::Result<(String, i32)> {
    let mut request = InterfaceRequest::new("", [0; 4])?;
    with_request(queue, libc::TUNGETIFF, &mut request)?;
    let [low, high, ..] = request.value;
    Ok((request.name(), i32::from(u16::from_ne_bytes([low, high]))))
}

/// Takes part in what the interface gets, or not (`IFF_ATTACH_QUEUE`, `IFF_DETACH_QUEUE`).
pub(super) fn set_attached(queue: BorrowedFd<'_>, is_attached: bool) -> io::Result<()> {
    let flags = if is_attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    with_request(queue, libc::TUNSETQUEUE, &mut InterfaceRequest::of_flags("", flags)?)
}

/// Another descriptor of what this number is open for.
pub(super) fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers alone, and says of one that is not open that it is not.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    result(copy)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Number of bytes of the header before each frame.
pub(super) fn set_header_size(queue: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    // SAFETY: the call reads one `int` from the address.
    result(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, std::ptr::from_ref(&bytes)) })
}

/// What the reader of frames takes without its being done for it (`TUN_F_CSUM` and the like).
pub(super) fn set_offload(queue: BorrowedFd<'_>, offload: u32) -> io::Result<()> {
    // SAFETY: the call takes a number and no pointer.
    result(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) })
}

/// Most bytes of a packet of the interface of this name, asked of any socket.
pub(super) fn mtu(socket: BorrowedFd<'_>, name: &str) -> io::Result<u32> {
    let mut request = InterfaceRequest::new(name, [0; 4])?;
    with_request(socket, SIOCGIFMTU, &mut request)?;
    Ok(u32::from_ne_bytes(request.value))
}

/// Parts of guest RAM in the order in which a frame lies in them, for calls of the kernel.
#[derive(Debug)]
pub(super) struct Scatter {
    /// Holds the memory that the parts are in.
    ram: Arc<GuestRam>,
    parts: Vec<libc::iovec>,
    /// Parts before this one have been taken off.
    first: usize,
}

// SAFETY: the addresses are of guest RAM, which `ram` holds and every thread may use.
unsafe impl Send for Scatter {}

impl Scatter {
    /// Of no part.
    pub(super) fn new(ram: &Arc<GuestRam>) -> Self {
        Self { ram: Arc::clone(ram), parts: Vec::new(), first: 0 }
    }

    /// Number of parts.
    pub(super) fn len(&self) -> usize {
        self.parts.len() - self.first
    }

    /// Takes all off.
    pub(super) fn clear(&mut self) {
        self.parts.clear();
        self.first = 0;
    }

    /// Takes the first parts off.
    pub(super) fn pop_front(&mut self, count: usize) {
        self.first += count;
        // What is left is moved once in so many parts.
        if self.first >= MAX_PARTS {
            self.parts.drain(..self.first);
            self.first = 0;
        }
    }

    /// Adds parts.
    ///
    /// # Errors
    /// When one is not all RAM, or leaves no room for what comes behind.
    pub(super) fn push(&mut self, parts: &[(GuestAddress, u32)]) -> Result<(), GuestMemoryError> {
        for (address, length) in parts {
            let slice = self.ram.memory().get_slice(*address, *length as usize)?;
            let base = slice.ptr_guard_mut().as_ptr().cast();
            self.parts.push(libc::iovec { iov_base: base, iov_len: slice.len() });
        }
        Ok(())
    }

    /// Reads a frame into the parts, and what does not fit into `rest`; the number of bytes of both. Whoever calls marks what was
    /// written ([`mark_written`]). No more than 1023 parts are used.
    pub(super) fn read(&mut self, queue: BorrowedFd<'_>, rest: &mut [u8]) -> io::Result<usize> {
        let used = self.len().min(MAX_PARTS - 1);
        let end = self.first + used;
        let overflow = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        // The part behind those that are used, or a new one, makes room for it meanwhile.
        self.parts.insert(end, overflow);
        // SAFETY: `used` + 1 parts are there. All but the last are whole slices of guest RAM, mapped for as long as `self.ram` is
        // there, of which nobody holds references; the last is `rest`, borrowed for the call alone.
        let read = unsafe { libc::readv(queue.as_raw_fd(), self.parts[self.first..].as_ptr(), used as i32 + 1) };
        self.parts.remove(end);
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Writes the parts as one frame; the number of bytes.
    pub(super) fn write(&self, queue: BorrowedFd<'_>) -> io::Result<usize> {
        let parts = &self.parts[self.first..];
        if parts.len() > MAX_PARTS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the parts are whole slices of guest RAM, mapped for as long as `self.ram` is there. The kernel copies what the guest
        // may change meanwhile.
        let written = unsafe { libc::writev(queue.as_raw_fd(), parts.as_ptr(), parts.len() as i32) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}

/// Notes that the kernel has written the first `bytes` of these parts, as writes of the monitor's are.
pub(super) fn mark_written(
    ram: &GuestRam,
    parts: &[(GuestAddress, u32)],
    mut bytes: u64,
) -> Result<(), GuestMemoryError> {
    for (address, length) in parts {
        let here = bytes.min(u64::from(*length));
        if here == 0 {
            break;
        }
        let slice = ram.memory().get_slice(*address, here as usize)?;
        slice.bitmap().mark_dirty(0, here as usize);
        bytes -= here;
    }
    Ok(())
}

/// A network of the calling thread's own, gone with the last thread and tap in it.
#[cfg(test)]
pub(super) fn own_network() -> io::Result<()> {
    // SAFETY: the thread gets another network and shares everything else as before.
    Ok(unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?)
}
