//! Reading shared memory and leaving residency as it was.

mod readers;
mod view;
mod walk;

use std::ops::Range;

use thiserror::Error;

use crate::memory::{FileView, Mapping, TargetError};
use crate::page_out::{PageOutError, PageOutReport, page_out};
use crate::page_range::{PageRange, PageRanges};
use crate::page_state::{Counts, PageState};
use crate::probe::{ProbeError, evicted, exact_probe, take_swap_cache};
use crate::residency::{Residency, Run};
use crate::swap::{SwapError, all_frees_at_once};
pub use readers::{ContentHash, SparseDump, ZeroFinder};
pub use view::ScanView;
pub use walk::{Reader, ScanProgress, ScanReport, scan};

/// Why residency could not be found out or restored.
#[derive(Debug, Error)]
pub enum ScanError {
    /// The states of the pages could not be found out.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// Pages could not be paged out again.
    #[error(transparent)]
    PageOut(#[from] PageOutError),
    /// The swap devices could not be listed.
    #[error(transparent)]
    Swap(#[from] SwapError),
    /// The memory cannot be mapped for reading.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The file may get shorter while it is read, which would end this process.
    #[error("the file can get shorter while it is read: seal it with F_SEAL_SHRINK")]
    NotSealed,
    /// The reader could not go on.
    #[error("the reader stopped: {0}")]
    Reader(std::io::Error),
    /// Pages that are not in the file, or a buffer that has not their size.
    #[error("pages {0:?} are not in the file, or the buffer has another size")]
    OutOfRange(Range<u64>),
}

/// For whoever is about to read shared memory: a snapshot of which pages are what, reading, and paging out again what was
/// swapped.
///
/// Holes should not be read at all: through a mapping that would allocate them, and only what was swapped is paged out again.
#[derive(Clone, Copy, Debug)]
pub struct ScanGuard<'m> {
    mapping: Mapping<'m>,
    /// The view that the mapping is of, when readers have one of their own.
    view: Option<&'m FileView>,
}

impl<'m> ScanGuard<'m> {
    /// A guard for readers of `mapping`.
    pub fn new(mapping: Mapping<'m>) -> Self {
        Self { mapping, view: None }
    }

    /// A guard for readers of `view`, through it or through its file.
    pub fn of_view(view: &'m FileView) -> Self {
        Self { mapping: view.mapping(), view: Some(view) }
    }

    /// Finds out, exactly, what the pages of the ranges are now. To be called right before reading them.
    ///
    /// Pages that the kernel has read ahead from zram, and that nobody has touched since, are taken for swapped: reading
    /// the pages of an earlier snapshot has brought them in.
    ///
    /// # Errors
    /// [`ScanError::Probe`] when pages are not in the mapping, or the kernel refuses.
    pub fn snapshot(&self, ranges: &[Range<u64>]) -> Result<ResidencySnapshot<'m>, ScanError> {
        let parts = ranges.iter().filter(|range| !range.is_empty());
        let parts = parts.map(|range| exact_probe().residency(&self.mapping, range.clone()));
        let parts = parts.collect::<Result<_, ProbeError>>()?;
        let mut snapshot =
            ResidencySnapshot { mapping: self.mapping, view: self.view, parts, kept: Vec::new(), done: false };
        if all_frees_at_once()? {
            snapshot.also_read_ahead()?;
        }
        Ok(snapshot)
    }
}

/// What pages were before they were read; made by [`ScanGuard::snapshot`].
///
/// Dropping it pages out again what [`ResidencySnapshot::restore`] would, as well as possible, so that a reader that
/// fails leaves memory as it found it too.
#[derive(Debug)]
#[must_use = "dropping it at once pages out at once: keep it until the pages are read"]
pub struct ResidencySnapshot<'m> {
    mapping: Mapping<'m>,
    view: Option<&'m FileView>,
    parts: Vec<Residency>,
    kept: Vec<Range<u64>>,
    done: bool,
}

impl ResidencySnapshot<'_> {
    /// The runs of pages in one state, in the mapping's page numbers and in the order of the ranges given.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.parts.iter().flat_map(Residency::runs)
    }

    /// How many pages of the ranges were in each state.
    pub fn counts(&self) -> Counts {
        self.parts.iter().fold(Counts::default(), |sum, residency| sum + residency.counts())
    }

    /// These pages are wanted in memory: they are not paged out again.
    pub fn keep(&mut self, pages: Range<u64>) {
        self.kept.push(pages);
    }

    /// These pages of the ranges are in memory and nobody wants them there: they go too.
    pub fn also(&mut self, pages: Range<u64>) {
        self.parts.iter_mut().for_each(|residency| residency.set(pages.clone(), PageState::Swapped));
    }

    /// What waits in the swap cache goes too, where nothing that was paged out waits there.
    fn also_read_ahead(&mut self) -> Result<(), ProbeError> {
        let mut read_ahead = PageRanges::new();
        for residency in &self.parts {
            // One call tells of all pages, as a rule.
            if evicted(&self.mapping, &residency.pages())? > residency.counts().swapped {
                let mut resident = residency.ranges_of(PageState::Resident).collect();
                read_ahead.extend(take_swap_cache(&self.mapping, &mut resident)?);
            }
        }
        read_ahead.into_iter().for_each(|pages| self.also(pages));
        Ok(())
    }

    /// Pages out again what was swapped and is not kept.
    ///
    /// # Errors
    /// [`ScanError::PageOut`] when nothing at all could be paged out.
    pub fn restore(mut self) -> Result<PageOutReport, ScanError> {
        self.done = true;
        self.page_out()
    }

    fn page_out(&mut self) -> Result<PageOutReport, ScanError> {
        for residency in &mut self.parts {
            self.kept.iter().for_each(|kept| residency.set(kept.clone(), PageState::Hole));
        }
        let swapped: Vec<_> = self.runs().filter(|run| run.state == PageState::Swapped).map(|run| run.pages).collect();
        Ok(match self.view {
            Some(view) => {
                let in_file: Vec<_> = swapped.iter().map(|range| self.mapping.in_file(range)).collect();
                view.page_out(&in_file)?
            }
            None => page_out(&self.mapping, &swapped)?,
        })
    }
}

impl Drop for ResidencySnapshot<'_> {
    fn drop(&mut self) {
        if !self.done {
            // The reader has failed already, and has its own error to tell.
            let _ = self.page_out();
        }
    }
}

/// Groups the runs of pages in `state` into windows of at most `window_pages` pages in total (0 counts as 1),
/// in order; long runs are split.
pub fn windows(
    residency: &Residency,
    state: PageState,
    window_pages: u64,
) -> impl Iterator<Item = Vec<Range<u64>>> + '_ {
    let window_pages = window_pages.max(1);
    let mut runs = residency.ranges_of(state);
    let mut rest: Option<Range<u64>> = None;
    std::iter::from_fn(move || {
        let mut window = Vec::new();
        let mut room = window_pages;
        while room > 0 {
            let Some(run) = rest.take().or_else(|| runs.next()) else {
                break;
            };
            let end = run.end.min(run.start + room);
            room -= (run.start..end).page_count();
            if end < run.end {
                rest = Some(end..run.end);
            }
            window.push(run.start..end);
        }
        (!window.is_empty()).then_some(window)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_are_full_and_cover_each_page_once(
            runs in prop::collection::vec((1..20u64, prop::bool::ANY), 0..40),
            size in 0..50u64,
        ) {
            let mut residency = Residency::default();
            for (pages, swapped) in runs {
                residency.push(pages, if swapped { PageState::Swapped } else { PageState::Hole });
            }
            let windows: Vec<_> = windows(&residency, PageState::Swapped, size).collect();
            let pages = |window: &Vec<Range<u64>>| window.iter().map(PageRange::page_count).sum::<u64>();
            let (last, full) = windows.split_last().map_or((0, &windows[..0]), |(l, f)| (pages(l), f));
            prop_assert!(last <= size.max(1) && full.iter().all(|w| pages(w) == size.max(1)));
            let listed: Vec<u64> = windows.into_iter().flatten().flatten().collect();
            let expected: Vec<u64> = residency.ranges_of(PageState::Swapped).flatten().collect();
            prop_assert_eq!(listed, expected);
        }
    }
}
