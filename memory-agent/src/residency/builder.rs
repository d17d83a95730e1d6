//! Making a [`Residency`] from its beginning to its end, quickly.

use super::Residency;
use super::chunk::{CHUNK_PAGES, Chunk, Tail};
use crate::page_number::PageNumber;
use crate::page_range::PageRange;
use crate::page_state::PageState;

/// A [`Residency`] under construction: pages are appended, which costs a few nanoseconds a run.
pub(crate) struct Builder<P> {
    first: P,
    len: u64,
    chunks: Vec<Chunk>,
    tail: Tail,
}

impl<P: PageNumber> Builder<P> {
    /// Nothing yet; the page appended first will be `first`.
    pub(crate) fn starting_at(first: P) -> Self {
        Self { first, len: 0, chunks: Vec::new(), tail: Tail::default() }
    }

    /// Appends `pages` pages in `state`.
    pub(crate) fn push(&mut self, pages: u64, state: PageState) {
        let mut left = pages;
        self.len += pages;
        while left > 0 {
            let room = u64::from(CHUNK_PAGES - self.tail.len());
            let fits = left.min(room);
            self.tail.push(fits as u32, state);
            if fits == room {
                self.chunks.push(std::mem::take(&mut self.tail).chunk());
            }
            left -= fits;
        }
    }

    /// Appends the pages up to `end` in `state`; nothing if they are there.
    pub(crate) fn fill(&mut self, end: P, state: PageState) {
        self.push((self.end()..end).page_count(), state);
    }

    /// The page behind those so far.
    pub(crate) fn end(&self) -> P {
        self.first + self.len
    }

    pub(crate) fn build(mut self) -> Residency<P> {
        if self.tail.len() > 0 {
            self.chunks.push(self.tail.chunk());
        }
        self.chunks.shrink_to_fit();
        Residency { first: self.first, len: self.len, chunks: self.chunks }
    }
}
