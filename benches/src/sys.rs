//! System calls that no crate offers, and memory to try them on.
#![allow(unsafe_code, reason = "system calls that take addresses, and a mapping that is written")]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::{null_mut, without_provenance_mut};

use memory_agent::{Mapping, PAGE_SIZE, PageRange};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A shared mapping that is written; unmapped on drop.
pub(crate) struct OwnMap {
    base: *mut c_void,
    length: usize,
}

impl OwnMap {
    pub(crate) fn new(file: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice, that only this knows.
        let base = unsafe { mmap(null_mut(), length, protection, MapFlags::SHARED | MapFlags::NORESERVE, file, 0) }?;
        Ok(Self { base, length })
    }

    pub(crate) fn address(&self) -> usize {
        self.base.addr()
    }

    /// Writes a number to the beginning of each page; the rest stays zero, so that it takes little room in zram.
    pub(crate) fn write_each_page(&self, pages: Range<u64>) {
        assert!(pages.end * PAGE_SIZE <= self.length as u64);
        for page in pages {
            // SAFETY: within the mapping, as just checked, and aligned to a page; nobody holds references into it.
            unsafe { self.base.byte_add((page * PAGE_SIZE) as usize).cast::<u64>().write_volatile(page | 1 << 63) };
        }
    }
}

impl Drop for OwnMap {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made by `new`, which nothing refers to any more.
        let _ = unsafe { munmap(self.base, self.length) };
    }
}

/// `lseek` from a page of the file on; whether it was understood: that there is nothing there is an answer too.
pub(crate) fn seek(mapping: &Mapping<'_>, page: u64, whence: i32) -> bool {
    let offset = mapping.file_offset_of(page).unwrap_or_default();
    // SAFETY: moves the offset of a file, which nobody depends on.
    let found = unsafe { libc::lseek(mapping.fd().as_raw_fd(), offset.cast_signed(), whence) };
    found >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO)
}

/// `mincore` of pages, at most as many as there is room for.
pub(crate) fn mincore(mapping: &Mapping<'_>, pages: &Range<u64>, answers: &mut [u8]) -> bool {
    let length = pages.page_count() as usize;
    let address = without_provenance_mut(mapping.address_of(pages.start).unwrap_or_default());
    assert!(length <= answers.len());
    // SAFETY: the kernel writes a byte a page to an array that has room for them and is exclusively ours.
    unsafe { libc::mincore(address, length * PAGE_SIZE as usize, answers.as_mut_ptr()) == 0 }
}

/// `cachestat` of pages.
pub(crate) fn cachestat(mapping: &Mapping<'_>, pages: &Range<u64>) -> bool {
    /// The libc crate lacks the number for glibc.
    const SYS_CACHESTAT: libc::c_long = 451;
    let offset = mapping.file_offset_of(pages.start).unwrap_or_default();
    let range = [offset, pages.byte_count()];
    let mut counts = [0_u64; 5];
    let fd = mapping.fd().as_raw_fd();
    // SAFETY: two numbers are what the kernel reads as the range, five what it writes as the counts; both are live.
    unsafe { libc::syscall(SYS_CACHESTAT, fd, range.as_ptr(), counts.as_mut_ptr(), 0) == 0 }
}

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

/// Requests to a file by io_uring, a number of them at a time, each with a buffer of its own.
pub(crate) struct Requests<'a> {
    ring: io_uring::IoUring,
    file: &'a std::fs::File,
    is_write: bool,
    /// Aligned as direct I/O wants it.
    buffers: OwnMap,
    bytes: usize,
    idle: Vec<u64>,
    under_way: usize,
}

impl<'a> Requests<'a> {
    pub(crate) fn new(file: &'a std::fs::File, is_write: bool, depth: u32, bytes: usize) -> io::Result<Self> {
        let memory = rustix::fs::memfd_create("buffers", rustix::fs::MemfdFlags::CLOEXEC)?;
        let length = bytes * depth as usize;
        rustix::fs::ftruncate(&memory, length as u64)?;
        let buffers = OwnMap::new(memory.as_fd(), length)?;
        buffers.write_each_page(0..length as u64 / PAGE_SIZE);
        let (ring, idle) = (io_uring::IoUring::new(depth)?, (0..u64::from(depth)).collect());
        Ok(Self { ring, file, is_write, buffers, bytes, idle, under_way: 0 })
    }

    /// Begins as many requests as have room, at the places that `next` gives, and waits for one at least; how many ended.
    ///
    /// # Errors
    /// When one failed or was cut short.
    pub(crate) fn turn(&mut self, next: &mut impl FnMut() -> u64) -> io::Result<u64> {
        use io_uring::{opcode, types};
        let fd = types::Fd(self.file.as_raw_fd());
        while let Some(index) = self.idle.pop() {
            let address = without_provenance_mut::<u8>(self.buffers.address() + index as usize * self.bytes);
            let (bytes, offset) = (self.bytes as u32, next());
            let entry = if self.is_write {
                opcode::Write::new(fd, address, bytes).offset(offset).build()
            } else {
                opcode::Read::new(fd, address, bytes).offset(offset).build()
            };
            // SAFETY: the buffer is within the mapping, only this request's, and outlives it: see `drop`.
            unsafe { self.ring.submission().push(&entry.user_data(index)) }.map_err(io::Error::other)?;
            self.under_way += 1;
        }
        self.ring.submit_and_wait(1)?;
        let mut ended = 0;
        for entry in self.ring.completion() {
            if usize::try_from(entry.result()) != Ok(self.bytes) {
                return Err(io::Error::other(format!("a request ended with {}", entry.result())));
            }
            self.idle.push(entry.user_data());
            ended += 1;
        }
        self.under_way -= ended as usize;
        Ok(ended)
    }
}

impl Drop for Requests<'_> {
    /// Waits for what is under way: the kernel writes to the buffers until then.
    fn drop(&mut self) {
        while self.under_way > 0 {
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => break,
                _ => self.under_way -= self.ring.completion().count(),
            }
        }
    }
}
