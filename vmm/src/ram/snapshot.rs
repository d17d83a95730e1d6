//! What guest RAM pages were before a reader came, over all regions.

use std::ops::Range;

use memory_agent::{HintProbe, Marker, PageOutReport, PageState, ResidencySnapshot, Run, ScanGuard};

use super::{GuestRam, RamError};

/// A snapshot of pages by [`GuestRam::snapshot`]. Dropped or restored, those that were swapped are paged out again.
pub struct RamSnapshot<'r> {
    parts: Vec<Part<'r>>,
}

struct Part<'r> {
    region: usize,
    /// RAM page number of the region's first page.
    first: u64,
    snapshot: ResidencySnapshot<'r>,
}

impl<'r> RamSnapshot<'r> {
    pub(super) fn new(
        ram: &'r GuestRam,
        ranges: &[Range<u64>],
        guard: impl Fn(usize) -> Result<ScanGuard<'r>, RamError>,
    ) -> Result<Self, RamError> {
        let mut parts = Vec::new();
        for (region, local) in ram.by_region(ranges)? {
            let first = ram.layout().regions()[..region].iter().map(|r| r.pages()).sum();
            let snapshot = guard(region)?.snapshot(&local)?;
            parts.push(Part { region, first, snapshot });
        }
        Ok(Self { parts })
    }

    /// Takes pages that are in memory, and in no page table of this process, for swapped: a neighbour that was read swapped
    /// them (`swap_cluster_readahead` in the kernel's mm/swap_state.c), or somebody else's reader, and not the guest.
    pub(super) fn with_strays(mut self, ram: &GuestRam) -> Result<Self, RamError> {
        for part in &mut self.parts {
            let mapping = ram.mapping(part.region)?;
            let awake: Vec<_> = part.snapshot.runs().filter(|run| run.state == PageState::Resident).collect();
            for Run { pages, .. } in awake {
                let mapped = Marker.hint(&mapping, pages.clone())?.into_believed();
                for run in mapped.runs().filter(|run| run.state != PageState::Resident) {
                    part.snapshot.also(pages.start + run.pages.start..pages.start + run.pages.end);
                }
            }
        }
        Ok(self)
    }

    /// What each page was, as maximal runs in RAM page numbers.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.parts.iter().flat_map(|part| {
            part.snapshot.runs().map(move |run| Run {
                pages: run.pages.start + part.first..run.pages.end + part.first,
                state: run.state,
            })
        })
    }

    /// The guest wants these pages now: they stay.
    pub fn keep(&mut self, pages: Range<u64>) {
        for part in &mut self.parts {
            let start = pages.start.max(part.first);
            if start < pages.end {
                part.snapshot.keep(start - part.first..pages.end - part.first);
            }
        }
    }

    /// Pages out again what was swapped.
    ///
    /// # Errors
    /// When the host cannot page out at all.
    pub fn restore_residency(self) -> Result<PageOutReport, RamError> {
        let mut report = PageOutReport::default();
        for part in self.parts {
            report = report.merge(part.snapshot.restore()?);
        }
        Ok(report)
    }
}
