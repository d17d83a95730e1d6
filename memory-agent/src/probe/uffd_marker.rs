//! Markers on a kernel as it is: asynchronous write protection leaves them.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use super::table_scan::{Kernel, entries, failed};
use super::{Hint, HintProbe, ProbeError, check_range};
use crate::memory::{Mapping, PageTables, Target};
use crate::sys::pagemap::Source;
use crate::sys::{pagemap, uffd};

/// Write-protects pages of this process's memory by userfaultfd, asynchronously, and reads the markers that such pages
/// leave when they are paged out. Linux 6.7.
///
/// A page that is not armed leaves no marker: one that was written since the last [`HintProbe::arm`] and then paged out is
/// open. Arming costs whoever writes a fault a page (some 6 us for a guest on KVM without hardware virtualization) at the
/// first write after it. A marker stays when its page is discarded, and when it comes back by another way than this
/// mapping.
///
/// Works on memory of the own process alone, since protection is registered with one's own address space.
#[derive(Debug)]
pub struct UffdMarker {
    /// Protection lasts as long as this is open.
    _protection: OwnedFd,
    tables: PageTables,
    addresses: Range<u64>,
    pages: u64,
}

impl UffdMarker {
    /// Registers the mapping and arms the pages that are present.
    ///
    /// # Errors
    /// When the kernel is older than 6.7, or has userfaultfd registered there already.
    pub fn new(mapping: &Mapping<'_>) -> Result<Self, ProbeError> {
        let pages = 0..mapping.pages();
        let protection = uffd::open(uffd::WP_SHMEM | uffd::WP_ASYNC)
            .map_err(|e| failed("userfaultfd (with asynchronous write protection, Linux 6.7)", &pages, e.into()))?;
        let tables = mapping.page_tables()?;
        let addresses = tables.addresses(&pages);
        uffd::register_write_protection(protection.as_fd(), &addresses)
            .map_err(|e| failed("UFFDIO_REGISTER", &pages, e.into()))?;
        let probe = Self { _protection: protection, tables, addresses, pages: pages.end };
        probe.arm()?;
        Ok(probe)
    }
}

impl HintProbe for UffdMarker {
    fn name(&self) -> &'static str {
        "uffd-marker"
    }

    fn hint(&self, target: &dyn Target, pages: Range<u64>) -> Result<Hint, ProbeError> {
        check_range(target, &pages)?;
        let address = target.page_tables()?.address;
        if target.is_elsewhere() || address != self.tables.address || target.mapping().pages() > self.pages {
            // Of other memory it knows nothing.
            return Ok(Hint::open(pages));
        }
        Ok(Hint::of(entries(&Kernel, &self.tables, &pages, Source::PageTables)?.build()))
    }

    fn arm(&self) -> Result<(), ProbeError> {
        pagemap::protect_written(&self.tables.pagemap, &self.addresses)
            .map(drop)
            .map_err(|e| failed("PAGEMAP_SCAN with write protection", &(0..self.pages), e.into()))
    }
}
