//! A mapping of its own for readers.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{SealFlags, fcntl_get_seals};

use crate::page_out::{PageOutReport, page_out};
use crate::page_state::PAGE_SIZE;
use crate::scan::{ScanError, ScanGuard};
use crate::sys::{self, SharedMap};
use crate::target::{Mapping, TargetError};

/// A mapping of its own for readers of shared memory.
///
/// Pages that were swapped are read and paged out again through it, and not through the mapping that the memory's owner
/// works with. That is quicker, since nothing is ever written through it: the kernel need not flush other CPUs' address
/// translations for each page it writes out (mm/vmscan.c `pageout`, `try_to_unmap_flush_dirty`). And it tells who wants a
/// page: one that the owner has touched meanwhile is mapped twice, and `MADV_PAGEOUT` leaves it alone.
#[derive(Debug)]
pub struct ScanView {
    file: OwnedFd,
    map: SharedMap,
}

impl ScanView {
    /// Maps the first `length` bytes of a shared memory file that is sealed against shrinking. The view's pages are
    /// the file's.
    ///
    /// # Errors
    /// When it is not sealed, not shared memory, or cannot be mapped.
    pub fn new(file: BorrowedFd<'_>, length: u64) -> Result<Self, ScanError> {
        if !fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
            return Err(ScanError::NotSealed);
        }
        let map = |source| TargetError::Io { what: "map", path: "the shared memory file".into(), source };
        let file = file.try_clone_to_owned().map_err(map)?;
        let view = Self { map: SharedMap::new(file.as_fd(), length as usize).map_err(map)?, file };
        Mapping::new(view.file.as_fd(), 0, view.map.address(), length)?;
        Ok(view)
    }

    /// A guard for what is read through this view.
    pub fn guard(&self) -> ScanGuard<'_> {
        ScanGuard::of_view(self.mapping(), self)
    }

    /// Copies what the pages hold now; `buffer` has exactly their size. Swapped pages are swapped in: have a guard
    /// remember them first. Holes would be allocated.
    ///
    /// # Errors
    /// [`ScanError::OutOfRange`] when not all pages are in the file, or the buffer is of another size.
    pub fn read(&self, pages: &Range<u64>, buffer: &mut [u8]) -> Result<(), ScanError> {
        self.check(pages)?;
        if (pages.end - pages.start) * PAGE_SIZE != buffer.len() as u64 {
            return Err(ScanError::OutOfRange(pages.clone()));
        }
        self.map.read(pages, buffer);
        Ok(())
    }

    /// Pages out resident pages that nobody has mapped, such as those just written to the file.
    ///
    /// # Errors
    /// As [`page_out`], and when the pages cannot be mapped for it.
    pub fn page_out(&self, ranges: &[Range<u64>]) -> Result<PageOutReport, ScanError> {
        for range in ranges {
            self.check(range)?;
            let (address, length) = self.mapping().bytes(range);
            sys::populate_read(address, length).map_err(|source| ScanError::Map {
                what: "map",
                pages: range.clone(),
                source,
            })?;
        }
        let report = page_out(&self.mapping(), ranges);
        self.unmap(ranges)?;
        Ok(report?)
    }

    fn mapping(&self) -> Mapping<'_> {
        Mapping::of_map(self.file.as_fd(), &self.map)
    }

    /// Takes pages out of this view's page tables, so that nobody but the owner maps them.
    pub(crate) fn unmap(&self, ranges: &[Range<u64>]) -> Result<(), ScanError> {
        for range in ranges {
            self.map.unmap(range).map_err(|source| ScanError::Map { what: "unmap", pages: range.clone(), source })?;
        }
        Ok(())
    }

    fn check(&self, pages: &Range<u64>) -> Result<(), ScanError> {
        if self.mapping().contains(pages) { Ok(()) } else { Err(ScanError::OutOfRange(pages.clone())) }
    }
}
