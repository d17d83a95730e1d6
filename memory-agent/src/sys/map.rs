//! A shared mapping that nobody touches.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags};

/// A mapping of the first bytes of a file, shared and never accessed; unmapped on drop.
#[derive(Debug)]
pub(crate) struct SharedMap {
    base: NonNull<c_void>,
    length: usize,
}

// SAFETY: the pointer is only ever handed out as a number, nothing behind it is accessed through this type.
unsafe impl Send for SharedMap {}
// SAFETY: as above; no method but `drop` does anything with the mapping.
unsafe impl Sync for SharedMap {}

/// The lowest address that may be mapped by default (`vm.mmap_min_addr`).
const LOWEST: usize = 0x1_0000;

impl SharedMap {
    /// Maps `length` bytes of `fd` from its beginning.
    pub(crate) fn new(fd: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        Self::map(fd, length, ptr::null_mut(), MapFlags::empty())
    }

    /// The same below all other mappings if there is room, which there is in position-independent programs.
    pub(crate) fn lowest(fd: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        Self::map(fd, length, ptr::without_provenance_mut(LOWEST), MapFlags::FIXED_NOREPLACE)
            .or_else(|_| Self::new(fd, length))
    }

    fn map(fd: BorrowedFd<'_>, length: usize, at: *mut c_void, flags: MapFlags) -> io::Result<Self> {
        let flags = flags | MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses a free place or is told to replace nothing, so no existing mapping
        // changes; no Rust reference to the new memory is ever made.
        let base = unsafe { rustix::mm::mmap(at, length, ProtFlags::READ, flags, fd, 0) }?;
        let base = NonNull::new(base).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { base, length })
    }

    pub(crate) fn address(&self) -> usize {
        self.base.addr().get()
    }

    pub(crate) fn length(&self) -> usize {
        self.length
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: this is exactly the mapping `new` made; it is unmapped once, and nothing points into it.
        // Failure would mean that it is not mapped, which leaves nothing to do.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.length) };
    }
}
