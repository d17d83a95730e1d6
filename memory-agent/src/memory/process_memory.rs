//! A shared mapping of another process.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::maps::SharedFileMapping;
use super::{FileView, Mapping, PageTables, Process, Target, TargetError, io_error};
use crate::page_number::{FilePage, PageNumber};
use crate::page_state::PAGE_SIZE;
use crate::sys;
use crate::sys::pins::MOST_RANGES;

/// Shared memory that another process has mapped: a memfd or a file in tmpfs, or a piece of one.
///
/// The process may end, execute another program or change its mappings at any time. Answers that could be wrong because
/// of that are errors.
#[derive(Debug)]
pub struct ProcessMemory {
    process: Arc<Process>,
    view: Arc<FileView>,
    pagemap: Arc<File>,
    mapped: SharedFileMapping,
}

impl ProcessMemory {
    pub(super) fn new(
        process: Arc<Process>,
        view: Arc<FileView>,
        mut mapped: SharedFileMapping,
    ) -> Result<Self, TargetError> {
        let whole = view.mapping().length();
        // What a process maps behind the end of a file are no pages.
        let length = whole.saturating_sub(mapped.offset).min(mapped.length());
        if length == 0 {
            return Err(TargetError::PastEnd { needed: mapped.offset + PAGE_SIZE, size: whole });
        }
        mapped.addresses.end = mapped.addresses.start + length;
        let pagemap = Arc::new(process.file("pagemap", "read the page tables")?);
        let memory = Self { process, view, pagemap, mapped };
        memory.check()?;
        Ok(memory)
    }

    /// The process.
    pub fn process(&self) -> &Arc<Process> {
        &self.process
    }

    /// The file's name, such as `/memfd:memory-backend-memfd`.
    pub fn name(&self) -> &str {
        &self.mapped.name
    }

    /// Where the process has its first byte.
    pub fn address(&self) -> u64 {
        self.mapped.addresses.start
    }

    /// Offset of the first byte in the file.
    pub fn file_offset(&self) -> u64 {
        self.mapped.offset
    }

    /// The whole file, of which the memory is a part: from [`ProcessMemory::file_offset`] on.
    pub fn file(&self) -> Arc<FileView> {
        Arc::clone(&self.view)
    }

    pub(super) fn is_of(&self, mapping: &SharedFileMapping) -> bool {
        self.mapped.file == mapping.file
    }

    /// Whether the mapping has nothing of the file that this has not.
    pub(super) fn covers(&self, mapping: &SharedFileMapping) -> bool {
        let (own, other) = (self.mapped.offsets(), mapping.offsets());
        self.is_of(mapping) && own.start <= other.start && other.end <= own.end
    }

    fn refused(&self, call: &'static str, since: &'static str, error: Errno) -> TargetError {
        let pid = self.process.pid();
        match error {
            _ if self.process.has_ended() => TargetError::Exited(pid),
            Errno::SRCH => TargetError::Exited(pid),
            Errno::NOSYS => TargetError::NoCall { call, since },
            Errno::PERM | Errno::ACCESS => {
                TargetError::NoRight { what: "page out memory", pid, capability: "CAP_SYS_NICE and CAP_SYS_PTRACE" }
            }
            e => self.check().err().unwrap_or_else(|| io_error(call, self.name())(e.into())),
        }
    }

    fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        self.address() + pages.start * PAGE_SIZE..self.address() + pages.end * PAGE_SIZE
    }
}

impl Target for ProcessMemory {
    fn mapping(&self) -> Mapping<'_> {
        let pages = FilePage(self.mapped.offset / PAGE_SIZE).run(self.mapped.length() / PAGE_SIZE);
        let whole = self.view.mapping();
        whole.part(&whole.of_file(&pages))
    }

    fn view(&self) -> Result<Arc<FileView>, TargetError> {
        Ok(Arc::clone(&self.view))
    }

    fn page_tables(&self) -> Result<PageTables, TargetError> {
        Ok(PageTables { pagemap: Arc::clone(&self.pagemap), address: self.address() })
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn is_elsewhere(&self) -> bool {
        true
    }

    fn check(&self) -> Result<(), TargetError> {
        let pid = self.process.pid();
        if self.process.shared_mappings()?.iter().any(|mapping| mapping.has(&self.mapped)) {
            return Ok(());
        }
        Err(TargetError::Remapped { pid, name: self.name().to_owned(), address: self.address() })
    }

    fn advise_page_out(&self, ranges: &[Range<u64>]) -> Result<(), TargetError> {
        self.check()?;
        let mut todo: Vec<_> = ranges.iter().map(|pages| self.addresses(pages)).collect();
        todo.retain(|range| !range.is_empty());
        let mut rest = &mut todo[..];
        while !rest.is_empty() {
            let done = sys::process::page_out(self.process.pidfd(), rest)
                .map_err(|e| self.refused("process_madvise", "5.10", e))?;
            if done == 0 {
                return Err(self.refused("process_madvise", "5.10", Errno::IO));
            }
            rest = behind(rest, done as u64);
        }
        Ok(())
    }

    fn advise_restore(&self, ranges: &[Range<u64>]) -> Result<(), TargetError> {
        let mapping = self.mapping();
        for ranges in ranges.chunks(MOST_RANGES) {
            let in_file: Vec<_> = ranges.iter().map(|pages| mapping.in_file(pages)).collect();
            match self.view.page_out_of(&in_file, || self.advise_page_out(ranges)) {
                // Not permitted, too many, or no io_uring: as for pages that nothing is known of.
                Err(TargetError::Io { .. }) => self.advise_page_out(ranges)?,
                done => done?,
            }
        }
        Ok(())
    }

    fn map_pages(&self, pages: &Range<u64>) -> Result<(), TargetError> {
        self.check()?;
        sys::process::map_pages(self.process.pid(), &self.addresses(pages))
            .map_err(|e| self.refused("process_vm_readv", "3.2", e))
    }
}

/// What is left of ranges after so many bytes.
fn behind(mut ranges: &mut [Range<u64>], mut bytes: u64) -> &mut [Range<u64>] {
    while bytes > 0 && !ranges.is_empty() {
        let length = ranges[0].end - ranges[0].start;
        if bytes < length {
            ranges[0].start += bytes;
            break;
        }
        bytes -= length;
        ranges = &mut ranges[1..];
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_begins_where_the_kernel_stopped() {
        let ranges = || vec![0..10, 20..25, 30..40];
        assert_eq!(behind(&mut ranges(), 0), [0..10, 20..25, 30..40]);
        assert_eq!(behind(&mut ranges(), 4), [4..10, 20..25, 30..40]);
        assert_eq!(behind(&mut ranges(), 15), [30..40]);
        assert!(behind(&mut ranges(), 25).is_empty());
    }
}
