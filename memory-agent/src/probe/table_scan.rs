//! What `PAGEMAP_SCAN` says of pages, in runs.

use std::ops::Range;

use rustix::io::Errno;

use super::ProbeError;
use crate::memory::PageTables;
use crate::page_number::Page;
use crate::page_range::PageRange;
use crate::page_state::{Counts, PAGE_SIZE, PageState};
use crate::residency::Builder;
use crate::sys::pagemap::{self, PAGE_IS_INCORE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PageRegion, Source, Wanted};

/// Regions that one call gives back: 12 KiB.
const REGIONS: usize = 512;
/// Bytes of memory that are asked about at a time, at most.
const STEP: u64 = 16384 * PAGE_SIZE;
/// Entries that are read at a time where there is no `PAGEMAP_SCAN`.
const ENTRIES: usize = 8192;

/// Who answers: the kernel, or a made-up one that tests have.
pub(super) trait Scan {
    /// As [`pagemap::scan`]; how many regions were filled, and the address up to which was looked.
    fn scan(
        &self,
        tables: &PageTables,
        addresses: &Range<u64>,
        source: Source,
        wanted: Wanted,
        regions: &mut [PageRegion],
    ) -> rustix::io::Result<(usize, u64)>;
}

/// The kernel of this host.
pub(super) struct Kernel;

impl Scan for Kernel {
    fn scan(
        &self,
        tables: &PageTables,
        addresses: &Range<u64>,
        source: Source,
        wanted: Wanted,
        regions: &mut [PageRegion],
    ) -> rustix::io::Result<(usize, u64)> {
        let (found, until) = pagemap::scan(&tables.pagemap, addresses, source, wanted, regions)?;
        Ok((found.len(), until))
    }
}

/// What page tables say of pages: present, swapped, or nothing, which is built as a hole.
///
/// Neighbours mostly are alike, and pages that a scan does not give back cost it least: so each step asks for those
/// pages that are not what most of the last step's were.
pub(super) fn entries(
    kernel: &dyn Scan,
    tables: &PageTables,
    pages: &Range<u64>,
    source: Source,
) -> Result<Builder<Page>, ProbeError> {
    entries_from(kernel, tables, pages, source, PageState::Hole)
}

/// The same, where the first step asks for pages that are not `most`.
pub(super) fn entries_from(
    kernel: &dyn Scan,
    tables: &PageTables,
    pages: &Range<u64>,
    source: Source,
    mut most: PageState,
) -> Result<Builder<Page>, ProbeError> {
    let in_memory = match source {
        Source::PageTables => PAGE_IS_PRESENT,
        Source::File => PAGE_IS_INCORE,
    };
    let mut found = Builder::starting_at(pages.start);
    let addresses = tables.addresses(pages);
    let mut regions = [PageRegion::default(); REGIONS];
    let mut asked = addresses.start;
    let page = |address: u64| tables.page_at(address.clamp(addresses.start, addresses.end));
    while asked < addresses.end {
        let wanted = match most {
            PageState::Hole => Wanted::AnyOf(in_memory | PAGE_IS_SWAPPED),
            PageState::Resident => Wanted::NotIn(in_memory),
            PageState::Swapped => Wanted::NotIn(PAGE_IS_SWAPPED),
        };
        let step = asked..addresses.end.min(asked + STEP);
        match kernel.scan(tables, &step, source, wanted, &mut regions) {
            Ok((count, until)) if until > asked => {
                let mut counts = Counts::default();
                let mut fill = |until: Page, state| {
                    counts.count(state, (found.end()..until).page_count());
                    found.fill(until, state);
                };
                for region in regions.iter().take(count) {
                    fill(page(region.start), most);
                    fill(page(region.end), state_of(region.categories));
                }
                fill(page(until), most);
                most = counts.most();
                asked = until;
            }
            Err(Errno::NOTTY) if source == Source::PageTables => {
                one_by_one(tables, &(page(asked)..pages.end), &mut found)?;
                asked = addresses.end;
            }
            Ok(_) => return Err(failed("PAGEMAP_SCAN", pages, Errno::IO.into())),
            Err(e) => return Err(failed("PAGEMAP_SCAN", pages, e.into())),
        }
    }
    Ok(found)
}

/// What categories say of a page.
fn state_of(categories: u64) -> PageState {
    if categories & (PAGE_IS_PRESENT | PAGE_IS_INCORE) != 0 {
        PageState::Resident
    } else if categories & PAGE_IS_SWAPPED != 0 {
        PageState::Swapped
    } else {
        PageState::Hole
    }
}

fn one_by_one(tables: &PageTables, pages: &Range<u64>, found: &mut Builder<Page>) -> Result<(), ProbeError> {
    let mut categories = vec![0; ENTRIES];
    let mut page = pages.start;
    while page < pages.end {
        let length = categories.len().min((pages.end - page) as usize);
        let address = tables.addresses(&(page..page)).start;
        let read = pagemap::read(&tables.pagemap, address / PAGE_SIZE, &mut categories[..length])
            .map_err(|e| failed("read of pagemap", pages, e))?;
        if read == 0 {
            return Err(failed("read of pagemap", pages, Errno::SRCH.into()));
        }
        for category in &categories[..read] {
            found.push(1, state_of(*category));
        }
        page += read as u64;
    }
    Ok(())
}

pub(super) fn failed(call: &'static str, pages: &Range<u64>, cause: std::io::Error) -> ProbeError {
    ProbeError::System { call, pages: pages.clone(), cause }
}
