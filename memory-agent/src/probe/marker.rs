//! Markers that a patched kernel leaves where it paged out.

use std::ops::Range;

use super::table_scan::{Kernel, entries};
use super::{Hint, HintProbe, ProbeError, check_range};
use crate::memory::Target;
use crate::residency::Residency;
use crate::sys::pagemap::Source;

/// Reads `PM_SWAP` from page tables: `PAGEMAP_SCAN` (Linux 6.7), or `/proc/PID/pagemap` entry by entry.
///
/// On a marker-patched kernel an entry stays behind where a page of shared memory was paged out. It can be missing (a
/// page that was not mapped when it went, a huge page) and it can be stale (the page has come back by another way). On
/// other kernels there are none, and every page that is not mapped is open.
///
/// Costs 2 to 8 ns a page, 10 to 20 where states alternate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marker;

impl HintProbe for Marker {
    fn name(&self) -> &'static str {
        "marker"
    }

    fn hint(&self, target: &dyn Target, pages: Range<u64>) -> Result<Hint, ProbeError> {
        check_range(target, &pages)?;
        Ok(Hint::of(mapped(target, &pages)?))
    }
}

/// Which pages the process that works with the memory has mapped, as resident ones; what all others are said to be is a hint.
pub(crate) fn mapped(target: &dyn Target, pages: &Range<u64>) -> Result<Residency, ProbeError> {
    let found = entries(&Kernel, &target.page_tables()?, pages, Source::PageTables);
    // That the process has gone is the better reason.
    target.check()?;
    Ok(found?.build())
}
