//! Which pages are in memory, in runs.

use std::ops::Range;

use super::ProbeError;
use crate::memory::{Mapping, PageTables, Target};
use crate::page_range::{PageRange, PageRanges};
use crate::page_state::{PAGE_SIZE, PageState};
use crate::residency::{Builder, Residency};
use crate::sys;
use crate::sys::pagemap::{PAGE_IS_PRESENT, PageRegion, Source, Wanted};

/// Pages asked about at a time: one page of answers, and some 500 us at most between a page's look and the
/// next step of whoever asked.
pub(super) const CHUNK: usize = 4096;

/// Gaps this near to one another are asked about in one call: it costs as much as so many pages.
const NEAR: usize = 4;

/// Asks about pages of one target, a chunk at a time.
pub(super) struct InMemory<'t> {
    mapping: Mapping<'t>,
    /// Another process's page tables, which tell of the pages it has mapped at a fraction of what the page cache costs.
    /// Own ones are looked at by `mincore` itself.
    tables: Option<PageTables>,
    answers: Box<[u8; CHUNK]>,
}

impl<'t> InMemory<'t> {
    pub(super) fn new(target: &'t dyn Target) -> Self {
        // Where they cannot be read, the page cache knows as much.
        let tables = target.is_elsewhere().then(|| target.page_tables().ok()).flatten();
        Self { mapping: target.mapping(), tables, answers: Box::new([0; CHUNK]) }
    }

    /// Asks about at most [`CHUNK`] pages from `pages.start` on, and calls `each` with every run and whether it is in
    /// memory. Returns the first page not asked about.
    pub(super) fn chunk(
        &mut self,
        pages: Range<u64>,
        mut each: impl FnMut(Range<u64>, bool) -> Result<(), ProbeError>,
    ) -> Result<u64, ProbeError> {
        let end = pages.end.min(pages.start + CHUNK as u64);
        let length = (pages.start..end).page_count() as usize;
        for gap in self.not_mapped(&(pages.start..end)) {
            let first = pages.start + gap.start as u64;
            let (address, _) = self.mapping.bytes(&(first..first));
            sys::mincore(address, PAGE_SIZE as usize, &mut self.answers[gap.clone()]).map_err(|cause| {
                ProbeError::System { call: "mincore", pages: first..first + gap.len() as u64, cause }
            })?;
        }
        let mut page = pages.start;
        let mut rest = &self.answers[..length];
        while let Some(first) = rest.first() {
            let (run, behind) = rest.split_at(run_length(rest));
            let next = page + run.len() as u64;
            each(page..next, first & 1 == 1)?;
            (page, rest) = (next, behind);
        }
        Ok(end)
    }

    /// The parts of the answers that another process's page tables leave open; the others are filled in.
    fn not_mapped(&mut self, pages: &Range<u64>) -> Vec<Range<usize>> {
        let length = pages.page_count() as usize;
        let Some(tables) = &self.tables else { return vec![0..length] };
        let addresses = tables.addresses(pages);
        let mut regions = [PageRegion::default(); 512];
        let mut gaps: Vec<Range<usize>> = Vec::new();
        let (mut asked, mut done) = (addresses.start, 0);
        let mut gap = |gap: Range<usize>| match gaps.last_mut() {
            Some(last) if gap.start - last.end <= NEAR => last.end = gap.end,
            _ if gap.is_empty() => {}
            _ => gaps.push(gap),
        };
        while asked < addresses.end {
            match sys::pagemap::scan(
                &tables.pagemap,
                &(asked..addresses.end),
                Source::PageTables,
                Wanted::AnyOf(PAGE_IS_PRESENT),
                &mut regions,
            ) {
                Ok((found, until)) if until > asked => {
                    for region in found {
                        let index =
                            |address| (tables.page_at(address).saturating_sub(pages.start) as usize).min(length);
                        let (start, end) = (index(region.start), index(region.end));
                        gap(done..start.max(done));
                        self.answers[start..end].fill(1);
                        done = end;
                    }
                    asked = until;
                }
                // No such call, no such memory any more: the page cache answers for all that is left.
                _ => break,
            }
        }
        gap(done..length);
        gaps
    }
}

/// How many answers are the same as the first.
fn run_length(answers: &[u8]) -> usize {
    /// As many at a time as the compiler makes few instructions of.
    const STEP: usize = 64;
    let first = answers[0];
    // Only the lowest bit is defined.
    let differs = |answer: &u8| (answer ^ first) & 1 == 1;
    let same = |step: &[u8]| step.iter().fold(0, |or, answer| or | (answer ^ first)) & 1 == 0;
    let steps = answers.chunks_exact(STEP).take_while(|step| same(step)).count() * STEP;
    steps + answers[steps..].iter().position(differs).unwrap_or(answers.len() - steps)
}

/// Which pages the process that works with the memory has mapped, as resident ones, all others as holes; `None` where
/// page tables cannot be asked in bulk. Costs 2 ns a page.
pub(crate) fn present(target: &dyn Target, pages: Range<u64>) -> Result<Option<Residency>, ProbeError> {
    let tables = target.page_tables()?;
    let addresses = tables.addresses(&pages);
    let mut regions = [PageRegion::default(); 512];
    let mut found = Builder::starting_at(pages.start);
    let mut asked = addresses.start;
    while asked < addresses.end {
        let Ok((regions, until)) = sys::pagemap::scan(
            &tables.pagemap,
            &(asked..addresses.end),
            Source::PageTables,
            Wanted::AnyOf(PAGE_IS_PRESENT),
            &mut regions,
        ) else {
            target.check()?;
            return Ok(None);
        };
        for region in regions {
            found.fill(tables.page_at(region.start), PageState::Hole);
            found.fill(tables.page_at(region.end), PageState::Resident);
        }
        if until <= asked {
            return Ok(None);
        }
        asked = until;
    }
    found.fill(pages.end, PageState::Hole);
    target.check()?;
    Ok(Some(found.build()))
}

/// Appends the pages of the range that are in memory to `runs`, which has none behind it.
pub(crate) fn resident_runs(target: &dyn Target, pages: &Range<u64>, runs: &mut PageRanges) -> Result<(), ProbeError> {
    let mut in_memory = InMemory::new(target);
    let mut page = pages.start;
    while page < pages.end {
        page = in_memory.chunk(page..pages.end, |run, resident| {
            if resident {
                runs.push(run);
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_run_ends_at_the_first_other_answer(answers in prop::collection::vec(0..4_u8, 1..300), length in 0..300usize) {
            let mut answers = answers;
            let length = length.min(answers.len());
            answers[..length].fill(2);
            let expected = answers.iter().take_while(|answer| (*answer ^ answers[0]) & 1 == 0).count();
            prop_assert_eq!(run_length(&answers), expected);
        }
    }
}
