//! Keeping the residency of a process's memory as it was, while somebody reads all of it.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::memory::{Target, TargetError};
use crate::page_out::{PageOutError, Way, page_out_by};
use crate::page_range::{PageRange, PageRanges};
use crate::page_state::{Counts, PageState};
use crate::probe::{ProbeError, exact_probe, present, resident_runs};
use crate::residency::Residency;
use crate::usage::counts_of;

/// So many pages at the reader's front are left to it: what it has just read it may still be sending.
const FRONT: u64 = 256;
/// So many more resident pages than page tables explain are worth a look at the page cache.
const UNEXPLAINED: u64 = 64;
/// How often pages that stay are asked for at the end.
const LAST_ATTEMPTS: u32 = 3;

/// Why memory could not be guarded.
#[derive(Debug, Error)]
pub enum GuardError {
    /// The states of the pages could not be found out.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// Pages could not be paged out again.
    #[error(transparent)]
    PageOut(#[from] PageOutError),
    /// The target is not what it was.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The map is of other memory.
    #[error("the map is of {map} pages and the memory has {memory}: give the map of this guest")]
    OtherMemory {
        /// Pages of the map.
        map: u64,
        /// Pages of the memory.
        memory: u64,
    },
}

/// What a guard has done, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardReport {
    /// What the memory was at the start, or should become.
    pub snapshot: Counts,
    /// Pages brought in: swapped pages that came into memory, and holes that were allocated.
    pub brought_in: u64,
    /// Pages of these that were restored.
    pub restored: u64,
    /// Pages of those restored that came again, and were left then: somebody works with them.
    pub refaulted: u64,
    /// Pages that are resident now and should not be, but for those that came again.
    pub excess: u64,
    /// The most of these at any look.
    pub excess_peak: u64,
}

/// Takes a snapshot of a target's residency, and restores it while somebody reads.
///
/// A page is restored once. If it comes into memory again after that, it is its owner who wants it, and it stays.
pub struct ResidencyGuard<'t> {
    target: &'t dyn Target,
    window: u64,
    /// What pages should be; those restored or found resident at the start are resident here.
    owed: Residency,
    /// Pages restored, as swapped ones: to see who comes again.
    done: Residency,
    /// What was resident at the last look and should not have been.
    excess: PageRanges,
    /// Resident pages that no page table explained at the start.
    unexplained: u64,
    report: GuardReport,
}

impl<'t> ResidencyGuard<'t> {
    /// A guard that restores what the target is now; at most about `window_pages` may be resident at a time
    /// that should not be.
    ///
    /// # Errors
    /// [`GuardError::Probe`] when the host does not tell.
    pub fn new(target: &'t dyn Target, window_pages: u64) -> Result<Self, GuardError> {
        let residency = exact_probe().residency(target, 0..target.mapping().pages())?;
        Self::like(target, window_pages, residency)
    }

    /// A guard that makes the target like a map: such as the one of the same guest on the host it comes from.
    ///
    /// # Errors
    /// [`GuardError::OtherMemory`] when the map has another size.
    pub fn like(target: &'t dyn Target, window_pages: u64, map: Residency) -> Result<Self, GuardError> {
        let memory = target.mapping().pages();
        if map.len() != memory {
            return Err(GuardError::OtherMemory { map: map.len(), memory });
        }
        let report = GuardReport { snapshot: map.counts(), ..GuardReport::default() };
        let mut guard = Self {
            target,
            window: window_pages.max(1),
            done: Residency::uniform(memory, PageState::Hole),
            owed: map,
            excess: PageRanges::new(),
            unexplained: 0,
            report,
        };
        let resident = guard.resident();
        if let Some(mapped) = guard.mapped()? {
            guard.unexplained = resident.saturating_sub(mapped.counts().resident);
        }
        Ok(guard)
    }

    /// Looks what has been brought in, and restores what the reader is done with. To be called some tens of times a second.
    ///
    /// # Errors
    /// When the host does not tell, nothing can be paged out, or the target has gone.
    pub fn step(&mut self) -> Result<GuardReport, GuardError> {
        let excess = self.look()?;
        let count = excess.page_count();
        self.report.excess_peak = self.report.excess_peak.max(count);
        // What was there at the last look already is behind the reader; with more than half of the window brought in all is
        // restored but the reader's front.
        let due = if count > self.window / 2 { excess.without_last(FRONT) } else { excess.intersection(&self.excess) };
        let left = self.restore(&due)?;
        self.report.excess = count - due.page_count() + left;
        self.excess = excess;
        Ok(self.report)
    }

    /// Pages out all that is resident and should not be.
    ///
    /// # Errors
    /// As [`ResidencyGuard::step`].
    pub fn finish(mut self) -> Result<GuardReport, GuardError> {
        for _ in 0..LAST_ATTEMPTS {
            let mut resident = PageRanges::new();
            resident_runs(self.target, &(0..self.owed.len()), &mut resident)?;
            let excess = self.excess_of(&resident);
            self.report.excess = excess.page_count();
            if self.report.excess == 0 {
                break;
            }
            self.report.excess = self.restore(&excess)?;
        }
        Ok(self.report)
    }

    /// The pages that are resident and should not be, in order.
    fn look(&mut self) -> Result<PageRanges, GuardError> {
        let mut runs = PageRanges::new();
        // In this order: what is brought in between the two looks is mapped as a rule, and only in the second.
        let resident = self.resident();
        match self.mapped()? {
            Some(mapped) if resident <= mapped.counts().resident + self.unexplained + UNEXPLAINED => {
                runs.extend(mapped.ranges_of(PageState::Resident));
            }
            // Read by another way than the process's own mapping, or nobody tells what that maps.
            _ => resident_runs(self.target, &(0..self.owed.len()), &mut runs)?,
        }
        self.count_refaults(&runs);
        Ok(self.excess_of(&runs))
    }

    /// What the process's page tables map, where that can be asked quickly.
    fn mapped(&self) -> Result<Option<Residency>, GuardError> {
        Ok(present(self.target, 0..self.owed.len())?)
    }

    /// Resident pages by the kernel's own sums.
    fn resident(&self) -> u64 {
        counts_of(&self.target.mapping()).map_or(u64::MAX, |counts| counts.resident)
    }

    /// The parts of ranges whose pages should not be in memory.
    fn excess_of(&self, ranges: &PageRanges) -> PageRanges {
        let runs = ranges.iter().flat_map(|range| self.owed.runs_in(range.clone()));
        runs.filter(|run| run.state != PageState::Resident).map(|run| run.pages).collect()
    }

    /// The pages of the ranges that should be holes, and the others.
    fn split(&self, ranges: &PageRanges) -> (PageRanges, PageRanges) {
        let (mut holes, mut swapped) = (PageRanges::new(), PageRanges::new());
        for run in ranges.iter().flat_map(|range| self.owed.runs_in(range.clone())) {
            if run.state == PageState::Hole { holes.push(run.pages) } else { swapped.push(run.pages) }
        }
        (holes, swapped)
    }

    fn count_refaults(&mut self, resident: &PageRanges) {
        for range in resident {
            let again: Vec<_> =
                self.done.runs_in(range.clone()).filter(|run| run.state == PageState::Swapped).collect();
            for run in again {
                self.report.refaulted += run.pages.page_count();
                self.done.set(run.pages, PageState::Resident);
            }
        }
    }

    /// Pages out, and tells how many pages stayed. Those that left memory are not owed any more.
    fn restore(&mut self, ranges: &PageRanges) -> Result<u64, GuardError> {
        if ranges.is_empty() {
            return Ok(0);
        }
        // What was a hole has been read and not written, as far as is known, and becomes one again.
        let (holes, swapped) = self.split(ranges);
        for (ranges, way) in [(&holes, Way::Mapped), (&swapped, Way::Restore)] {
            match page_out_by(self.target, ranges, way) {
                // The owner works with all of them, or a reader still has them mapped.
                Ok(_) | Err(PageOutError::Kept(_)) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let mut stayed = PageRanges::new();
        for range in ranges {
            resident_runs(self.target, range, &mut stayed)?;
        }
        for range in ranges {
            self.report.brought_in += range.page_count();
            self.report.restored += range.page_count();
            self.owed.set(range.clone(), PageState::Resident);
            self.done.set(range.clone(), PageState::Swapped);
        }
        for range in &stayed {
            // Not restored; asked for again.
            self.report.brought_in -= range.page_count();
            self.report.restored -= range.page_count();
            self.owed.set(range.clone(), PageState::Swapped);
            self.done.set(range.clone(), PageState::Hole);
        }
        stayed.intersection(&holes).into_iter().for_each(|range| self.owed.set(range, PageState::Hole));
        Ok(stayed.page_count())
    }
}
