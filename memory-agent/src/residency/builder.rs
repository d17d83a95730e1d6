//! Making a [`Residency`] from its beginning to its end, quickly.

use super::Residency;
use super::chunk::{CHUNK_PAGES, Chunk, Tail};
use crate::page_state::PageState;

/// A [`Residency`] under construction: pages are appended, which costs a few nanoseconds a run.
#[derive(Default)]
pub(crate) struct Builder {
    len: u64,
    chunks: Vec<Chunk>,
    tail: Tail,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self::default()
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

    /// Appends pages in `state` until there are `len` of them; nothing if there are as many or more.
    pub(crate) fn fill(&mut self, len: u64, state: PageState) {
        self.push(len.saturating_sub(self.len), state);
    }

    /// Number of pages so far.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn build(mut self) -> Residency {
        if self.tail.len() > 0 {
            self.chunks.push(self.tail.chunk());
        }
        self.chunks.shrink_to_fit();
        Residency { len: self.len, chunks: self.chunks }
    }
}
