//! A compact map of which pages of a range are holes, resident or swapped.

mod builder;
mod chunk;
mod runs;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::page_range::PageRange;
use crate::page_state::{Counts, PageState};
pub(crate) use builder::Builder;
use chunk::{CHUNK_PAGES, Chunk};
pub use runs::{Run, Runs};

/// The most pages that a map read from elsewhere may claim: 256 TiB of memory.
const MAX_PAGES_FROM_OUTSIDE: u64 = 1 << 36;

/// Why runs do not make a [`Residency`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ResidencyError {
    /// The runs leave a gap or overlap.
    #[error(
        "the run at page {found} does not follow the one that ends at page {expected}: give runs in order and without gaps"
    )]
    NotConsecutive {
        /// Where the run should have started.
        expected: u64,
        /// Where it starts.
        found: u64,
    },
    /// The runs claim more pages than any host has.
    #[error("a map of more than {MAX_PAGES_FROM_OUTSIDE} pages is not believable: check where it came from")]
    TooLong,
}

/// The state of each of `len` pages, numbered from 0.
///
/// Uniform stretches cost next to nothing (24 bytes for each 64 MiB of pages), a run two bytes, and the worst
/// pattern 2 bits a page. Reading and setting ranges is logarithmic in the number of runs nearby.
/// Serialized as a list of `(pages, state)` runs.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(into = "Vec<(u64, PageState)>", try_from = "Vec<(u64, PageState)>")]
pub struct Residency {
    len: u64,
    chunks: Vec<Chunk>,
}

/// Appends pages that somebody else counted.
fn push_bounded(builder: &mut Builder, pages: u64, state: PageState) -> Result<(), ResidencyError> {
    if builder.len().checked_add(pages).is_none_or(|len| len > MAX_PAGES_FROM_OUTSIDE) {
        return Err(ResidencyError::TooLong);
    }
    builder.push(pages, state);
    Ok(())
}

fn chunk_of(page: u64) -> usize {
    (page / u64::from(CHUNK_PAGES)) as usize
}

/// The parts of `pages` by chunk: its number, and the pages within it.
fn by_chunk(pages: Range<u64>) -> impl Iterator<Item = (usize, Range<u32>)> {
    let size = u64::from(CHUNK_PAGES);
    let chunks = if pages.is_empty() { 0..0 } else { pages.start / size..pages.end.div_ceil(size) };
    chunks.map(move |chunk| {
        let first = chunk * size;
        let from = pages.start.max(first) - first;
        let to = pages.end.min(first + size) - first;
        (chunk as usize, from as u32..to as u32)
    })
}

impl Residency {
    /// `len` pages that are all in `state`. Allocates 24 bytes for each 64 MiB of pages at once: bound a length that
    /// comes from outside first.
    pub fn uniform(len: u64, state: PageState) -> Self {
        let chunks = len.div_ceil(u64::from(CHUNK_PAGES)) as usize;
        Self { len, chunks: vec![Chunk::Uniform(state); chunks] }
    }

    /// The map that `runs` describe; they start at page 0 and follow one another, empty ones are allowed.
    ///
    /// # Errors
    /// [`ResidencyError::NotConsecutive`] if they do not, [`ResidencyError::TooLong`] beyond 256 TiB of pages.
    pub fn from_runs(runs: impl IntoIterator<Item = Run>) -> Result<Self, ResidencyError> {
        let mut builder = Builder::new();
        for Run { pages, state } in runs {
            if pages.start != builder.len() {
                return Err(ResidencyError::NotConsecutive { expected: builder.len(), found: pages.start });
            }
            push_bounded(&mut builder, pages.page_count(), state)?;
        }
        Ok(builder.build())
    }

    /// Appends `pages` pages in `state`.
    pub fn push(&mut self, pages: u64, state: PageState) {
        let start = self.len;
        self.len += pages;
        let chunks = self.len.div_ceil(u64::from(CHUNK_PAGES)) as usize;
        self.chunks.resize(chunks, Chunk::Uniform(state));
        self.set(start..self.len, state);
    }

    /// Appends all pages of `other`.
    pub fn append(&mut self, other: &Self) {
        for run in other.runs() {
            self.push(run.pages.page_count(), run.state);
        }
    }

    /// These pages as a map of their own, numbered from 0; what lies beyond the end is left out.
    #[must_use]
    pub fn part(&self, pages: Range<u64>) -> Self {
        let mut part = Builder::new();
        self.runs_in(pages).for_each(|run| part.push(run.pages.page_count(), run.state));
        part.build()
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no pages at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The state of `page`, or `None` beyond the end.
    pub fn get(&self, page: u64) -> Option<PageState> {
        let within = (page % u64::from(CHUNK_PAGES)) as u32;
        (page < self.len).then(|| self.chunks[chunk_of(page)].run_at(within).0)
    }

    /// Puts the pages of the range into `state`; what lies beyond the end is ignored.
    pub fn set(&mut self, pages: Range<u64>, state: PageState) {
        let pages = self.clip(pages);
        // Pages of the last chunk beyond the end may be anything, so a write up to the end fills the chunk:
        // a uniform map stays uniform.
        let to_chunk_end = pages.end == self.len && !pages.is_empty();
        let size = u64::from(CHUNK_PAGES);
        let end = if to_chunk_end { pages.end.next_multiple_of(size) } else { pages.end };
        for (chunk, pages) in by_chunk(pages.start..end) {
            self.chunks[chunk].set(pages, state);
        }
    }

    /// How many pages are in each state.
    pub fn counts(&self) -> Counts {
        self.counts_in(0..self.len)
    }

    /// How many pages of the range are in each state; what lies beyond the end is ignored.
    pub fn counts_in(&self, pages: Range<u64>) -> Counts {
        by_chunk(self.clip(pages))
            .fold(Counts::default(), |sum, (chunk, pages)| sum + self.chunks[chunk].counts_in(pages))
    }

    /// Bytes this map has allocated.
    pub fn heap_bytes(&self) -> usize {
        let own = self.chunks.capacity() * size_of::<Chunk>();
        own + self.chunks.iter().map(Chunk::heap_bytes).sum::<usize>()
    }

    fn clip(&self, pages: Range<u64>) -> Range<u64> {
        pages.start.min(self.len)..pages.end.min(self.len)
    }
}

impl PartialEq for Residency {
    fn eq(&self, other: &Self) -> bool {
        // Runs, not chunks: the same content can be held in different forms.
        self.len == other.len && self.runs().eq(other.runs())
    }
}

impl Eq for Residency {}

impl fmt::Debug for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        write!(f, "Residency({} pages", self.len)?;
        for run in self.runs().take(SHOWN) {
            write!(f, ", {:?} {:?}", run.pages, run.state)?;
        }
        if self.runs().nth(SHOWN).is_some() {
            write!(f, ", ... {:?}", self.counts())?;
        }
        write!(f, ")")
    }
}

impl From<Residency> for Vec<(u64, PageState)> {
    fn from(residency: Residency) -> Self {
        residency.runs().map(|run| (run.pages.page_count(), run.state)).collect()
    }
}

impl TryFrom<Vec<(u64, PageState)>> for Residency {
    type Error = ResidencyError;

    fn try_from(runs: Vec<(u64, PageState)>) -> Result<Self, ResidencyError> {
        let mut builder = Builder::new();
        for (pages, state) in runs {
            push_bounded(&mut builder, pages, state)?;
        }
        Ok(builder.build())
    }
}
