//! A mapping of its own for readers.

use std::fs::File;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::{ScanError, ScanGuard};
use crate::memory::{FileView, TargetError};
use crate::page_out::PageOutReport;
use crate::page_range::PageRange;

/// A [`FileView`] of a file that is sealed against shrinking, which can therefore be read through its mapping: some 20 %
/// quicker for swapped pages than through the file.
#[derive(Debug)]
pub struct ScanView(FileView);

impl ScanView {
    /// Maps the first `length` bytes of a shared memory file that is sealed against shrinking. The view's pages are
    /// the file's: both are counted from the file's first.
    ///
    /// # Errors
    /// When it is not sealed, not shared memory, or cannot be mapped.
    pub fn new(file: BorrowedFd<'_>, length: u64) -> Result<Self, ScanError> {
        let map = |cause| TargetError::Io { what: "map", path: "the shared memory file".into(), cause };
        let file = File::from(file.try_clone_to_owned().map_err(map)?);
        let view = FileView::new(file, length)?;
        if view.is_sealed() { Ok(Self(view)) } else { Err(ScanError::NotSealed) }
    }

    /// A guard for what is read through this view.
    pub fn guard(&self) -> ScanGuard<'_> {
        ScanGuard::of_view(&self.0)
    }

    /// Copies what the pages hold now; `buffer` has exactly their size. Swapped pages are swapped in: have a guard
    /// take a snapshot of them first. Holes would be allocated.
    ///
    /// # Errors
    /// [`ScanError::OutOfRange`] when not all pages are in the file, or the buffer is of another size.
    pub fn read(&self, pages: &Range<u64>, buffer: &mut [u8]) -> Result<(), ScanError> {
        if pages.byte_count() != buffer.len() as u64 || !self.0.mapping().contains(pages) {
            return Err(ScanError::OutOfRange(pages.clone()));
        }
        self.0.map().read(&self.0.mapping().in_file(pages), buffer);
        Ok(())
    }

    /// Pages out resident pages that nobody has mapped, such as those just written to the file.
    ///
    /// # Errors
    /// As [`page_out`](crate::page_out), and when the pages cannot be mapped for it.
    pub fn page_out(&self, ranges: &[Range<u64>]) -> Result<PageOutReport, ScanError> {
        let mapping = self.0.mapping();
        let in_file: Vec<_> = ranges.iter().map(|range| mapping.in_file(range)).collect();
        Ok(self.0.page_out(&in_file)?)
    }
}
