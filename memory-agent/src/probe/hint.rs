//! What a quick probe believes.

use std::ops::Range;

use super::{Probe, ProbeError};
use crate::memory::Target;
use crate::page_number::{Page, PageNumber};
use crate::page_range::{PageRange, PageRanges};
use crate::page_state::{Counts, PageState};
use crate::residency::{Residency, Run};

/// What pages may be: the answer of a probe that can be wrong.
///
/// It says where to look, and decides nothing. In particular it never says that a page is a hole: pages that a probe
/// knows nothing of are *open*, holes among them, and the exact probe answers for those.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint<P: PageNumber = Page> {
    /// Holes are open pages.
    believed: Residency<P>,
}

impl<P: PageNumber> Hint<P> {
    /// Pages of which nothing is known.
    pub fn open(pages: Range<P>) -> Self {
        let believed = Residency::<P>::uniform(pages.page_count(), PageState::Hole);
        Self { believed: believed.renumbered(pages.start) }
    }

    /// What somebody believes, such as a map that is no longer fresh; what it calls holes is open.
    pub fn of(believed: Residency<P>) -> Self {
        Self { believed }
    }

    /// Which pages these are.
    pub fn pages(&self) -> Range<P> {
        self.believed.pages()
    }

    /// The same, counted in another way, in which the first page is called `first`.
    #[must_use]
    pub fn renumbered<Q: PageNumber>(self, first: Q) -> Hint<Q> {
        Hint { believed: self.believed.renumbered(first) }
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.believed.len()
    }

    /// Whether there are no pages at all.
    pub fn is_empty(&self) -> bool {
        self.believed.is_empty()
    }

    /// The state that a page may be in; `None` when it is open, or not of those asked about.
    pub fn get(&self, page: P) -> Option<PageState> {
        self.believed.get(page).filter(|state| *state != PageState::Hole)
    }

    /// The runs of pages that may be resident or swapped.
    pub fn runs(&self) -> impl Iterator<Item = Run<P>> + '_ {
        self.believed.runs().filter(|run| run.state != PageState::Hole)
    }

    /// The ranges of pages of which nothing is known.
    pub fn open_ranges(&self) -> impl Iterator<Item = Range<P>> + '_ {
        self.believed.ranges_of(PageState::Hole)
    }

    /// How many pages are open (`hole`), believed resident and believed swapped.
    pub fn counts(&self) -> Counts {
        self.believed.counts()
    }

    /// What is believed, as a map; open pages are holes in it, which is what must not be believed.
    pub fn into_believed(self) -> Residency<P> {
        self.believed
    }
}

impl Hint {
    /// Has the exact probe answer for the open pages. In the result holes are certain; which of the other pages are in memory is
    /// in part belief.
    ///
    /// # Errors
    /// [`ProbeError`] when the pages are not in the target, or the kernel refuses.
    pub fn resolve(self, target: &dyn Target, exact: &dyn Probe) -> Result<Residency, ProbeError> {
        let open: PageRanges = self.open_ranges().collect();
        let mut resolved = self.believed;
        for open in open.joined(NEAR) {
            // A span has pages in it that were not open: what is certain of them is welcome.
            exact.residency(target, open)?.runs().for_each(|run| resolved.set(run.pages, run.state));
        }
        Ok(resolved)
    }
}

/// Open ranges this near to one another are asked about in one go: a look at some pages costs less than beginning anew.
const NEAR: u64 = 16;
