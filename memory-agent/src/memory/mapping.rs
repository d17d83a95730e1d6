//! A mapping in this process.

use std::fs::File;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::fs::{fstat, fstatfs};

use super::{FileView, PageTables, Target, TargetError, io_error};
use crate::page_number::{FilePage, Page, PageNumber};
use crate::page_range::PageRange;
use crate::page_state::PAGE_SIZE;
use crate::sys::{self, SharedMap};

/// File system type of a memfd and of tmpfs (include/uapi/linux/magic.h `TMPFS_MAGIC`).
pub(super) const TMPFS_MAGIC: i64 = 0x0102_1994;

/// An existing `MAP_SHARED` mapping of a shared memory file in this process.
///
/// Pages are numbered from 0 at the mapping's first byte. Making one is safe whatever the numbers are, since
/// nothing behind the address is ever read or written by this crate: the kernel is only asked about it, or
/// advised to map or page out. If the file is not what is mapped there, the answers are of no use, no more.
///
/// Probing moves the file offset of the descriptor (`SEEK_DATA`). Several probes at a time are no danger to one
/// another, because what they ask does not depend on the offset; a user of the same open file must not depend
/// on it either, and use `pread` and `pwrite`.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'fd> {
    fd: BorrowedFd<'fd>,
    file_offset: u64,
    address: usize,
    length: u64,
}

impl<'fd> Mapping<'fd> {
    /// A mapping of `length` bytes of `fd` from `file_offset` (bytes) on, at the host virtual `address`.
    ///
    /// # Errors
    /// [`TargetError`] when the numbers are not aligned, or the file is too short, not shared memory, or not
    /// writable for this user.
    pub fn new(fd: BorrowedFd<'fd>, file_offset: u64, address: usize, length: u64) -> Result<Self, TargetError> {
        let page_size = rustix::param::page_size();
        if page_size as u64 != PAGE_SIZE {
            return Err(TargetError::PageSize(page_size));
        }
        for (what, value, zero_allowed) in
            [("file offset", file_offset, true), ("address", address as u64, false), ("length", length, false)]
        {
            if value % PAGE_SIZE != 0 || value == 0 && !zero_allowed {
                return Err(TargetError::Unaligned { what, value });
            }
        }
        if (address as u64).checked_add(length).is_none_or(|end| end > isize::MAX as u64) {
            return Err(TargetError::Overflow { start: address as u64, length });
        }
        let needed = file_offset.checked_add(length).filter(|&end| end <= i64::MAX as u64);
        let needed = needed.ok_or(TargetError::Overflow { start: file_offset, length })?;

        let file_system = fstatfs(fd).map_err(|e| io_error("examine", "the mapped file")(e.into()))?;
        if file_system.f_type != TMPFS_MAGIC {
            return Err(TargetError::NotSharedMemory);
        }
        let stat = fstat(fd).map_err(|e| io_error("examine", "the mapped file")(e.into()))?;
        let size = stat.st_size.max(0) as u64;
        if size < needed {
            return Err(TargetError::PastEnd { needed, size });
        }
        if !is_told(fd, stat.st_uid).map_err(io_error("examine", "the mapped file"))? {
            return Err(TargetError::NotWritable);
        }
        Ok(Self { fd, file_offset, address, length })
    }

    /// A mapping of our own of a file's beginning, known to be as it should.
    pub(crate) fn of_map(fd: BorrowedFd<'fd>, map: &SharedMap) -> Self {
        Self { fd, file_offset: 0, address: map.address(), length: map.length() as u64 }
    }

    /// These pages of the mapping as a mapping of its own.
    pub(crate) fn part(&self, pages: &Range<u64>) -> Self {
        let (address, length) = self.bytes(pages);
        Self { fd: self.fd, file_offset: self.offset(pages.start), address, length: length as u64 }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.length / PAGE_SIZE
    }

    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'fd> {
        self.fd
    }

    /// Host virtual address of the first byte of `page`, or `None` beyond the end.
    pub fn address_of(&self, page: u64) -> Option<usize> {
        (page < self.pages()).then(|| self.address + (page * PAGE_SIZE) as usize)
    }

    /// Offset in the file, in bytes, of the first byte of `page`, or `None` beyond the end.
    pub fn file_offset_of(&self, page: u64) -> Option<u64> {
        (page < self.pages()).then(|| self.file_offset + page * PAGE_SIZE)
    }

    /// The pages of the file that pages of the mapping are.
    pub fn in_file(&self, pages: &Range<Page>) -> Range<FilePage> {
        pages.renumbered(Page::default(), FilePage(self.file_offset / PAGE_SIZE))
    }

    /// The pages of the mapping that pages of the file are; those before its first are left out.
    pub fn of_file(&self, pages: &Range<FilePage>) -> Range<Page> {
        pages.renumbered(FilePage(self.file_offset / PAGE_SIZE), Page::default())
    }

    /// All pages, as those of the file.
    pub fn all_in_file(&self) -> Range<FilePage> {
        self.in_file(&Page::default().run(self.pages()))
    }

    /// Whether all pages of the range exist.
    pub(crate) fn contains(&self, pages: &Range<u64>) -> bool {
        pages.start <= pages.end && pages.end <= self.pages()
    }

    /// Address and length in bytes of pages that exist.
    pub(crate) fn bytes(&self, pages: &Range<u64>) -> (usize, usize) {
        let address = self.address + (pages.start * PAGE_SIZE) as usize;
        (address, pages.byte_count() as usize)
    }

    /// Offset in the file of a page, or of the end.
    pub(crate) fn offset(&self, page: u64) -> u64 {
        self.file_offset + page * PAGE_SIZE
    }

    /// The page at or after an offset in the file.
    pub(crate) fn page_at(&self, offset: u64) -> u64 {
        offset.saturating_sub(self.file_offset) / PAGE_SIZE
    }
}

impl Target for Mapping<'_> {
    fn mapping(&self) -> Mapping<'_> {
        *self
    }

    fn view(&self) -> Result<Arc<FileView>, TargetError> {
        let file = self.fd.try_clone_to_owned().map_err(io_error("open", "the mapped file"))?;
        Ok(Arc::new(FileView::new(File::from(file), self.file_offset + self.length)?))
    }

    fn page_tables(&self) -> Result<PageTables, TargetError> {
        const PATH: &str = "/proc/self/pagemap";
        let pagemap = Arc::new(File::open(PATH).map_err(io_error("open", PATH))?);
        Ok(PageTables { pagemap, address: self.address as u64 })
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn is_elsewhere(&self) -> bool {
        false
    }

    fn check(&self) -> Result<(), TargetError> {
        Ok(())
    }

    fn advise_page_out(&self, ranges: &[Range<u64>]) -> Result<(), TargetError> {
        for range in ranges {
            let (address, length) = self.bytes(range);
            sys::page_out(address, length).map_err(|e| io_error("page out", "own memory")(e.into()))?;
        }
        Ok(())
    }

    fn map_pages(&self, pages: &Range<u64>) -> Result<(), TargetError> {
        let (address, length) = self.bytes(pages);
        sys::populate_read(address, length).map_err(|e| io_error("map", "own memory")(e.into()))
    }
}

/// Whether the kernel tells this user which pages of the file are in memory. Its owner is told; of anybody else the kernel
/// knows (mm/mincore.c `can_do_mincore`), and is asked.
fn is_told(fd: BorrowedFd<'_>, owner: u32) -> std::io::Result<bool> {
    /// Whoever a user namespace does not know (`/proc/sys/kernel/overflowuid`), and who may be anybody.
    const UNKNOWN: u32 = 65534;
    let user = rustix::process::geteuid().as_raw();
    if user == owner && user != UNKNOWN { Ok(true) } else { sys::tells_residency(fd) }
}
