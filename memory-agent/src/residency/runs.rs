//! Walking a [`Residency`] run by run.

use std::ops::Range;

use super::chunk::CHUNK_PAGES;
use super::{Residency, chunk_of};
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

    /// The ranges of pages for which `wanted(state here, state in other)` holds, in order and maximal;
    /// pages that only one of the two maps has are left out.
    pub fn ranges_where<'a>(
        &'a self,
        other: &'a Self,
        wanted: impl Fn(PageState, PageState) -> bool + 'a,
    ) -> impl Iterator<Item = Range<u64>> + 'a {
        let end = self.len.min(other.len);
        let mut here = self.runs_in(0..end).peekable();
        let mut there = other.runs_in(0..end).peekable();
        let mut page = 0;
        std::iter::from_fn(move || {
            let mut found: Option<Range<u64>> = None;
            while let (Some(a), Some(b)) = (here.peek(), there.peek()) {
                let until = a.pages.end.min(b.pages.end);
                let matches = wanted(a.state, b.state);
                let (a_done, b_done) = (a.pages.end == until, b.pages.end == until);
                if matches {
                    found = Some(found.map_or(page, |found| found.start)..until);
                }
                page = until;
                if a_done {
                    here.next();
                }
                if b_done {
                    there.next();
                }
                if !matches && found.is_some() {
                    break;
                }
            }
            found
        })
    }
}
