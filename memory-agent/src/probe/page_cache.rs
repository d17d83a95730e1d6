//! Asking the page cache: `mincore`, `cachestat` and `SEEK_DATA`.

use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::in_memory::InMemory;
use super::swap_cache::cachestat;
use super::{Probe, ProbeError, check_range};
use crate::memory::{Mapping, Target};
use crate::page_number::Page;
use crate::page_range::PageRange;
use crate::page_state::{PAGE_SIZE, PageState};
use crate::residency::{Builder, Residency};
use crate::sys::Cachestat;

/// Looks every page up in the page cache: needs no preparation, no privileges, and works on any kernel.
///
/// `mincore` tells what is in memory; another process's page tables (`PAGEMAP_SCAN`) spare it the pages that are mapped
/// there. What is not is a hole or swapped, and which of the two is decided by
/// `cachestat` (Linux 6.5), for a whole run of such pages in one look at each: a page that was a hole at the
/// first look and has been written before the second is not taken for a swapped one. `SEEK_DATA` and
/// `SEEK_HOLE` only find where holes and swapped pages meet; `SEEK_HOLE` alone would walk to the end of the data,
/// however far that is beyond the pages asked for, with the file locked.
///
/// Costs about 4 ns a page that is mapped here, 80 one that is only in memory, 300 a swapped one, 800 where holes and
/// swapped pages alternate, and next to nothing in long holes (Linux 6.18, a virtual machine).
///
/// On older kernels `SEEK_DATA` has to decide, and `mincore` looks a second time; a page that is written *and*
/// discarded between these two looks, some 100 us, can be reported swapped.
#[derive(Clone, Copy, Debug, Default)]
pub struct PageCache;

impl Probe for PageCache {
    fn name(&self) -> &'static str {
        "page-cache"
    }

    fn residency(&self, target: &dyn Target, pages: Range<u64>) -> Result<Residency, ProbeError> {
        residency(target, pages, true)
    }
}

/// What [`PageCache`] does on kernels before 6.5, on any kernel: to compare, and to test it.
#[derive(Clone, Copy, Debug, Default)]
pub struct PageCacheBySeek;

impl Probe for PageCacheBySeek {
    fn name(&self) -> &'static str {
        "page-cache-by-seek"
    }

    fn residency(&self, target: &dyn Target, pages: Range<u64>) -> Result<Residency, ProbeError> {
        residency(target, pages, false)
    }
}

/// The probe; `cachestat` says whether to try that call.
fn residency(target: &dyn Target, pages: Range<u64>, cachestat: bool) -> Result<Residency, ProbeError> {
    let mapping = &target.mapping();
    check_range(target, &pages)?;
    let mut in_memory = InMemory::new(target);
    let mut look = Look { target, mapping, found: Builder::starting_at(pages.start), cachestat };
    let mut page = pages.start;
    // Long holes are skipped in one step.
    while let Some(data) = next_data(mapping, page)?.filter(|&data| data < pages.end) {
        page = in_memory.chunk(data..pages.end, |run, resident| {
            if resident {
                look.set(run, PageState::Resident);
                return Ok(());
            }
            look.absent(run)
        })?;
    }
    look.found.fill(pages.end, PageState::Hole);
    target.check()?;
    Ok(look.found.build())
}

struct Look<'a> {
    target: &'a dyn Target,
    mapping: &'a Mapping<'a>,
    /// What has been found out so far, from the first page on.
    found: Builder<Page>,
    cachestat: bool,
}

impl Look<'_> {
    /// These pages are in this state; those passed over since the last call are holes.
    fn set(&mut self, pages: Range<u64>, state: PageState) {
        self.found.fill(pages.start, PageState::Hole);
        self.found.fill(pages.end, state);
    }

    /// Decides on pages that were not in memory a moment ago.
    fn absent(&mut self, pages: Range<u64>) -> Result<(), ProbeError> {
        let Some(now) = self.count(&pages)? else {
            return self.absent_without_cachestat(pages);
        };
        if now.evicted == pages.page_count() {
            self.set(pages, PageState::Swapped);
            return Ok(());
        }
        if now.evicted == 0 && now.cache == 0 {
            return Ok(());
        }
        // There is something else than swapped pages, so SEEK_HOLE finds an end within the run, or the run has
        // just changed.
        let mut page = pages.start;
        while let Some(data) = next_data(self.mapping, page)?.filter(|&data| data < pages.end) {
            let end = next_hole(self.mapping, data)?.min(pages.end).max(data + 1);
            self.changing(data..end)?;
            page = end;
        }
        Ok(())
    }

    /// Decides on pages that probably are all swapped, and halves the run until it is certain.
    fn changing(&mut self, pages: Range<u64>) -> Result<(), ProbeError> {
        let length = pages.page_count();
        let Some(now) = self.count(&pages)? else {
            return self.absent_without_cachestat(pages);
        };
        if now.evicted == length {
            self.set(pages, PageState::Swapped);
        } else if now.evicted == 0 && now.cache == 0 {
            self.set(pages, PageState::Hole);
        } else if length > 1 {
            let middle = pages.start + length / 2;
            self.changing(pages.start..middle)?;
            self.changing(middle..pages.end)?;
        } else if next_data(self.mapping, pages.start)? == Some(pages.start) {
            // In the page cache, and it reads as data: allocated but unwritten pages are in the cache as well.
            self.set(pages, PageState::Resident);
        }
        Ok(())
    }

    fn absent_without_cachestat(&mut self, pages: Range<u64>) -> Result<(), ProbeError> {
        let mut page = pages.start;
        while let Some(data) = next_data(self.mapping, page)?.filter(|&data| data < pages.end) {
            let end = data_end(self.mapping, data, pages.end)?;
            let mut at = data;
            let mut in_memory = InMemory::new(self.target);
            while at < end {
                at = in_memory.chunk(at..end, |run, resident| {
                    self.set(run, if resident { PageState::Resident } else { PageState::Swapped });
                    Ok(())
                })?;
            }
            page = end;
        }
        Ok(())
    }

    /// What is in the page cache, or `None` where the kernel cannot count.
    fn count(&mut self, pages: &Range<u64>) -> Result<Option<Cachestat>, ProbeError> {
        if !self.cachestat {
            return Ok(None);
        }
        let counts = cachestat(self.mapping, pages)?;
        self.cachestat = counts.is_some();
        Ok(counts)
    }
}

/// The end of the data from `page` on, or `limit` if that comes first.
fn data_end(mapping: &Mapping<'_>, page: u64, limit: u64) -> Result<u64, ProbeError> {
    // A call for each page costs about as much as a walk over 16 pages, and the walk may go on to the end.
    const WALK: u64 = 16;
    if mapping.pages() - page <= WALK * (limit - page) {
        return Ok(next_hole(mapping, page)?.min(limit).max(page + 1));
    }
    let mut end = page + 1;
    while end < limit && next_data(mapping, end)? == Some(end) {
        end += 1;
    }
    Ok(end)
}

/// The first page at or after `page` that holds data, in memory or swapped.
fn next_data(mapping: &Mapping<'_>, page: u64) -> Result<Option<u64>, ProbeError> {
    match seek(mapping.fd(), SeekFrom::Data(mapping.offset(page))) {
        Ok(offset) => Ok(Some(mapping.page_at(offset))),
        // Nothing but holes up to the end of the file.
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(seek_error("SEEK_DATA", mapping, page, e)),
    }
}

/// The first page at or after `page` that is a hole, or the end of the file.
fn next_hole(mapping: &Mapping<'_>, page: u64) -> Result<u64, ProbeError> {
    let offset = seek(mapping.fd(), SeekFrom::Hole(mapping.offset(page)));
    // A file need not end with a whole page.
    let offset = offset.map_err(|e| seek_error("SEEK_HOLE", mapping, page, e))?;
    Ok(mapping.page_at(offset.next_multiple_of(PAGE_SIZE)))
}

fn seek_error(call: &'static str, mapping: &Mapping<'_>, page: u64, error: Errno) -> ProbeError {
    ProbeError::System { call, pages: page..mapping.pages(), cause: error.into() }
}
