//! The exact query of the project's kernel: page tables and the page cache in one call.

use std::ops::Range;

use rustix::io::Errno;

use super::table_scan::{Kernel, entries};
use super::{PageCache, Probe, ProbeError, check_range, trial};
use crate::memory::Target;
use crate::residency::Residency;
use crate::sys::pagemap::Source;

/// Asks `PAGEMAP_SCAN` with `PM_SCAN_EXACT_SWAP` (host-kernel/patches): pages that are mapped cost nothing, the others a walk of
/// the file's page cache, a page table's worth at a time.
///
/// Of a page that the answer does not have it says that it is a hole. So the kernel is believed after it has given the right
/// answer about pages of this process's own, in each state; that takes swap to page out to. Where the kernel has no such
/// query, is not believed, or does not answer it for this memory, [`PageCache`] does.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExactScan;

impl ExactScan {
    /// Whether the kernel has the query and answers as it should; `None` where that cannot be tried because nothing can be
    /// paged out.
    pub(super) fn is_believed() -> Option<bool> {
        trial::exact_scan()
    }
}

impl Probe for ExactScan {
    fn name(&self) -> &'static str {
        "exact-scan"
    }

    fn residency(&self, target: &dyn Target, pages: Range<u64>) -> Result<Residency, ProbeError> {
        check_range(target, &pages)?;
        if Self::is_believed() != Some(true) {
            return PageCache.residency(target, pages);
        }
        let found = entries(&Kernel, &target.page_tables()?, &pages, Source::File);
        target.check()?;
        match found {
            Err(ProbeError::System { cause, .. }) if is_no_answer(&cause) => PageCache.residency(target, pages),
            found => Ok(found?.build()),
        }
    }
}

/// Whether the kernel has refused to answer, as opposed to failed.
fn is_no_answer(error: &std::io::Error) -> bool {
    let codes = [Errno::INVAL, Errno::NOTTY, Errno::OPNOTSUPP, Errno::PERM];
    error.raw_os_error().is_some_and(|code| codes.contains(&Errno::from_raw_os_error(code)))
}
