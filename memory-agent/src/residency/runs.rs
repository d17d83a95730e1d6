//! Walking a [`Residency`] run by run.

use std::ops::Range;

use super::chunk::CHUNK_PAGES;
use super::{Builder, Residency, chunk_of};
use crate::page_number::{Page, PageNumber};
use crate::page_range::PageRange;
use crate::page_state::PageState;

/// Neighbouring pages in one state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run<P = Page> {
    /// Page numbers.
    pub pages: Range<P>,
    /// The state of all of them.
    pub state: PageState,
}

/// The maximal runs of a range, in order; made by [`Residency::runs`] and [`Residency::runs_in`].
#[derive(Clone, Debug)]
pub struct Runs<'a, P: PageNumber = Page> {
    residency: &'a Residency<P>,
    /// Where in its chunks those are that are left.
    places: Range<u64>,
}

impl<P: PageNumber> Iterator for Runs<'_, P> {
    type Item = Run<P>;

    fn next(&mut self) -> Option<Run<P>> {
        if self.places.is_empty() {
            return None;
        }
        let start = self.places.start;
        let mut state = None;
        while !self.places.is_empty() {
            let place = self.places.start;
            let within = place % u64::from(CHUNK_PAGES);
            let (here, end) = self.residency.chunks[chunk_of(place)].run_at(within as u32);
            if *state.get_or_insert(here) != here {
                break;
            }
            self.places.start = (place - within + u64::from(end)).min(self.places.end);
            if end < CHUNK_PAGES {
                break;
            }
        }
        let pages = (start..self.places.start).renumbered(0, self.residency.first);
        state.map(|state| Run { pages, state })
    }
}

impl<P: PageNumber> Residency<P> {
    /// The maximal runs of pages in one state, in order.
    pub fn runs(&self) -> Runs<'_, P> {
        self.runs_in(self.pages())
    }

    /// The maximal runs within a range, in order, cut at its ends; pages that are not in the map are
    /// left out.
    pub fn runs_in(&self, pages: Range<P>) -> Runs<'_, P> {
        Runs { residency: self, places: self.places(pages) }
    }

    /// The ranges of pages in `state`, in order.
    pub fn ranges_of(&self, state: PageState) -> impl Iterator<Item = Range<P>> + '_ {
        self.runs().filter(move |run| run.state == state).map(|run| run.pages)
    }

    /// Both maps side by side: the maximal ranges within which neither changes, in order, with the state here and in
    /// `other`; pages that only one of the two has are left out.
    pub fn zip<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (Range<P>, PageState, PageState)> + 'a {
        let both = self.pages().intersection(&other.pages());
        let mut page = both.start;
        let mut here = self.runs_in(both.clone()).peekable();
        let mut there = other.runs_in(both).peekable();
        std::iter::from_fn(move || {
            let (a, b) = (here.peek()?, there.peek()?);
            let (end_a, end_b) = (a.pages.end, b.pages.end);
            let both = (page..end_a.min(end_b), a.state, b.state);
            page = both.0.end;
            if end_a == page {
                here.next();
            }
            if end_b == page {
                there.next();
            }
            Some(both)
        })
    }

    /// The map whose pages are in state `state(state here, state in other)`: unions, intersections and differences of the
    /// pages in any states. It is of the pages that both have.
    #[must_use]
    pub fn combine(&self, other: &Self, state: impl Fn(PageState, PageState) -> PageState) -> Self {
        let mut combined = Builder::starting_at(self.pages().intersection(&other.pages()).start);
        self.zip(other).for_each(|(pages, a, b)| combined.push(pages.page_count(), state(a, b)));
        combined.build()
    }

    /// The ranges of pages for which `wanted(state here, state in other)` holds, in order and maximal;
    /// pages that only one of the two maps has are left out.
    pub fn ranges_where<'a>(
        &'a self,
        other: &'a Self,
        wanted: impl Fn(PageState, PageState) -> bool + 'a,
    ) -> impl Iterator<Item = Range<P>> + 'a {
        let mut found = self.zip(other).filter(move |(_, a, b)| wanted(*a, *b)).map(|(pages, ..)| pages).peekable();
        std::iter::from_fn(move || {
            let mut range = found.next()?;
            while let Some(next) = found.next_if(|next| next.start == range.end) {
                range.end = next.end;
            }
            Some(range)
        })
    }
}
