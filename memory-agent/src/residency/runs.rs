//! Walking a [`Residency`] run by run.

use std::ops::Range;

use super::chunk::CHUNK_PAGES;
use super::{Builder, Residency, chunk_of};
use crate::page_range::PageRange;
use crate::page_state::PageState;

/// Neighbouring pages in one state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Page numbers.
    pub pages: Range<u64>,
    /// The state of all of them.
    pub state: PageState,
}

/// The maximal runs of a range, in order; made by [`Residency::runs`] and [`Residency::runs_in`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    residency: &'a Residency,
    pages: Range<u64>,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.pages.is_empty() {
            return None;
        }
        let start = self.pages.start;
        let mut state = None;
        while !self.pages.is_empty() {
            let page = self.pages.start;
            let within = page % u64::from(CHUNK_PAGES);
            let (here, end) = self.residency.chunks[chunk_of(page)].run_at(within as u32);
            if *state.get_or_insert(here) != here {
                break;
            }
            self.pages.start = (page - within + u64::from(end)).min(self.pages.end);
            if end < CHUNK_PAGES {
                break;
            }
        }
        state.map(|state| Run { pages: start..self.pages.start, state })
    }
}

impl Residency {
    /// The maximal runs of pages in one state, in order.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_in(0..self.len)
    }

    /// The maximal runs within a range, in order, cut at its ends; what lies beyond the end of the map is
    /// left out.
    pub fn runs_in(&self, pages: Range<u64>) -> Runs<'_> {
        Runs { residency: self, pages: self.clip(pages) }
    }

    /// The ranges of pages in `state`, in order.
    pub fn ranges_of(&self, state: PageState) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs().filter(move |run| run.state == state).map(|run| run.pages)
    }

    /// Both maps side by side: the maximal ranges within which neither changes, in order, with the state here and in
    /// `other`; pages that only one of the two has are left out.
    pub fn zip<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (Range<u64>, PageState, PageState)> + 'a {
        let end = self.len.min(other.len);
        let mut here = self.runs_in(0..end).peekable();
        let mut there = other.runs_in(0..end).peekable();
        let mut page = 0;
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
    /// pages in any states. It is as long as the shorter of the two.
    #[must_use]
    pub fn combine(&self, other: &Self, state: impl Fn(PageState, PageState) -> PageState) -> Self {
        let mut combined = Builder::new();
        self.zip(other).for_each(|(pages, a, b)| combined.push(pages.page_count(), state(a, b)));
        combined.build()
    }

    /// The ranges of pages for which `wanted(state here, state in other)` holds, in order and maximal;
    /// pages that only one of the two maps has are left out.
    pub fn ranges_where<'a>(
        &'a self,
        other: &'a Self,
        wanted: impl Fn(PageState, PageState) -> bool + 'a,
    ) -> impl Iterator<Item = Range<u64>> + 'a {
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
