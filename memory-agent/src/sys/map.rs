//! A shared mapping that nobody writes through or holds references into.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::page_number::{FilePage, PageNumber};
use crate::page_range::PageRange;
use crate::page_state::PAGE_SIZE;

/// A mapping of bytes of a file, the first ones as a rule, shared; unmapped on drop. Nothing is ever written through it.
#[derive(Debug)]
pub(crate) struct SharedMap {
    base: NonNull<c_void>,
    length: usize,
}

// SAFETY: the pointer belongs to no thread; what is behind it is only ever read, as memory that others may write.
unsafe impl Send for SharedMap {}
// SAFETY: as above; any number of threads may read and unmap pages at a time, the kernel orders them.
unsafe impl Sync for SharedMap {}

/// The lowest address that may be mapped by default (`vm.mmap_min_addr`).
const LOWEST: usize = 0x1_0000;

impl SharedMap {
    /// Maps `length` bytes of `fd` from its beginning.
    pub(crate) fn new(fd: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        Self::far(fd, length, 0)
    }

    /// The same from an offset on, which may be behind the end.
    pub(super) fn far(fd: BorrowedFd<'_>, length: usize, offset: u64) -> io::Result<Self> {
        Self::map(fd, length, ProtFlags::READ, ptr::null_mut(), MapFlags::empty(), offset)
    }

    /// The same with the right to write, for those who pin pages.
    pub(crate) fn writable(fd: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        Self::map(fd, length, ProtFlags::READ | ProtFlags::WRITE, ptr::null_mut(), MapFlags::empty(), 0)
    }

    /// The same below all other mappings if there is room, which there is in position-independent programs.
    pub(crate) fn lowest(fd: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        Self::map(fd, length, ProtFlags::READ, ptr::without_provenance_mut(LOWEST), MapFlags::FIXED_NOREPLACE, 0)
            .or_else(|_| Self::new(fd, length))
    }

    fn map(
        fd: BorrowedFd<'_>,
        length: usize,
        protection: ProtFlags,
        at: *mut c_void,
        flags: MapFlags,
        offset: u64,
    ) -> io::Result<Self> {
        let flags = flags | MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses a free place or is told to replace nothing, so no existing mapping
        // changes; no Rust reference to the new memory is ever made.
        let base = unsafe { rustix::mm::mmap(at, length, protection, flags, fd, offset) }?;
        let base = NonNull::new(base).ok_or(io::ErrorKind::InvalidData)?;
        let map = Self { base, length };
        super::no_huge_pages(map.address(), length)?;
        Ok(map)
    }

    pub(crate) fn address(&self) -> usize {
        self.base.addr().get()
    }

    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// Copies what the pages hold now; `buffer` has exactly their size. Panics unless they are all in the mapping.
    ///
    /// The file must not get shorter meanwhile: the kernel ends a process that reads behind the end with SIGBUS.
    pub(crate) fn read(&self, pages: &Range<FilePage>, buffer: &mut [u8]) {
        let (offset, length) = self.bytes(pages);
        assert_eq!(length, buffer.len());
        for (i, word) in buffer.chunks_exact_mut(size_of::<u64>()).enumerate() {
            // SAFETY: `bytes` has checked that the pages are in the mapping, whose start is aligned to a page, and a page
            // is whole words. Volatile because others write this memory whenever they like.
            let value = unsafe { self.base.byte_add(offset).cast::<u64>().add(i).read_volatile() };
            word.copy_from_slice(&value.to_ne_bytes());
        }
    }

    /// Takes the pages out of this mapping's page tables (`MADV_DONTNEED`); the file keeps them. Panics unless they are
    /// all in the mapping.
    pub(crate) fn unmap(&self, pages: &Range<FilePage>) -> rustix::io::Result<()> {
        let (offset, length) = self.bytes(pages);
        // SAFETY: of a shared file mapping this drops page-table entries only (mm/madvise.c, `madvise_dontneed_single_vma`):
        // what the memory reads as stays what the file holds. The range was checked, and this is `new`'s mapping.
        unsafe { rustix::mm::madvise(self.base.as_ptr().byte_add(offset), length, Advice::LinuxDontNeed) }
    }

    /// Address and length in bytes of pages. Panics unless they are all in the mapping.
    pub(super) fn at(&self, pages: &Range<FilePage>) -> (NonNull<c_void>, usize) {
        let (offset, length) = self.bytes(pages);
        // SAFETY: `bytes` has checked that it is within the mapping.
        (unsafe { self.base.byte_add(offset) }, length)
    }

    /// Offset and length in bytes of pages that must be in the mapping.
    fn bytes(&self, pages: &Range<FilePage>) -> (usize, usize) {
        let whole = FilePage(self.length as u64 / PAGE_SIZE);
        assert!(pages.start <= pages.end && pages.end <= whole, "pages {pages:?} of {whole}");
        ((pages.start.number() * PAGE_SIZE) as usize, pages.byte_count() as usize)
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: this is exactly the mapping `new` made; it is unmapped once, and nothing points into it.
        // Failure would mean that it is not mapped, which leaves nothing to do.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.length) };
    }
}
