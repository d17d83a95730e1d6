//! What guest RAM pages were before a reader came, over all regions.

use std::ops::Range;

use memory_agent::{HintProbe, Marker, PageOutReport, PageState, ResidencySnapshot, Run, ScanGuard};

use super::layout::RegionPart;
use super::{GuestRam, RamError, RamPage};

/// A snapshot of pages by [`GuestRam::snapshot`]. Dropped or restored, those that were swapped are paged out again.
pub struct RamSnapshot<'r> {
    parts: Vec<Part<'r>>,
}

struct Part<'r> {
    region: RegionPart,
    snapshot: ResidencySnapshot<'r>,
}

impl<'r> RamSnapshot<'r> {
    pub(super) fn new(
        ram: &'r GuestRam,
        ranges: &[Range<RamPage>],
        guard: impl Fn(usize) -> Result<ScanGuard<'r>, RamError>,
    ) -> Result<Self, RamError> {
        let mut parts = Vec::new();
        for (region, local) in ram.by_region(ranges)? {
            let snapshot = guard(region.region)?.snapshot(&local)?;
            parts.push(Part { region, snapshot });
        }
        Ok(Self { parts })
    }

    /// Takes pages that are in memory, and in no page table of this process, for swapped: a neighbour that was read swapped
    /// them (`swap_cluster_readahead` in the kernel's mm/swap_state.c), or somebody else's reader, and not the guest.
    pub(super) fn with_strays(mut self, ram: &GuestRam) -> Result<Self, RamError> {
        for part in &mut self.parts {
            let mapping = ram.mapping(part.region.region)?;
            let awake: Vec<_> = part.snapshot.runs().filter(|run| run.state == PageState::Resident).collect();
            for Run { pages, .. } in awake {
                let mapped = Marker.hint(&mapping, pages)?.into_believed();
                for run in mapped.runs().filter(|run| run.state != PageState::Resident) {
                    part.snapshot.also(run.pages);
                }
            }
        }
        Ok(self)
    }

    /// What each page was, as maximal runs in RAM page numbers.
    pub fn runs(&self) -> impl Iterator<Item = Run<RamPage>> + '_ {
        self.parts.iter().flat_map(|part| {
            part.snapshot.runs().map(|Run { pages, state }| Run { pages: part.region.in_ram(&pages), state })
        })
    }

    /// The guest wants these pages now: they stay.
    pub fn keep(&mut self, pages: Range<RamPage>) {
        for part in &mut self.parts {
            part.snapshot.keep(part.region.in_region(&pages));
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
