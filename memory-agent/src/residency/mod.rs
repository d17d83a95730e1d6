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

use crate::page_number::{Page, PageNumber};
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

/// The state of each page of a range.
///
/// Uniform stretches cost next to nothing (24 bytes for each 64 MiB of pages), a run two bytes, and the worst
/// pattern 2 bits a page. Reading and setting ranges is logarithmic in the number of runs nearby.
/// Serialized as a list of `(pages, state)` runs, without the first page's number, which is 0 when it is read.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(bound = "P: PageNumber", into = "Vec<(u64, PageState)>", try_from = "Vec<(u64, PageState)>")]
pub struct Residency<P = Page> {
    first: P,
    len: u64,
    chunks: Vec<Chunk>,
}

/// Appends pages that somebody else counted.
fn push_bounded<P: PageNumber>(builder: &mut Builder<P>, pages: u64, state: PageState) -> Result<(), ResidencyError> {
    let len = (P::default()..builder.end()).page_count();
    if len.checked_add(pages).is_none_or(|len| len > MAX_PAGES_FROM_OUTSIDE) {
        return Err(ResidencyError::TooLong);
    }
    builder.push(pages, state);
    Ok(())
}

fn chunk_of(place: u64) -> usize {
    (place / u64::from(CHUNK_PAGES)) as usize
}

/// The parts of `places` by chunk: its number, and the pages within it.
fn by_chunk(places: Range<u64>) -> impl Iterator<Item = (usize, Range<u32>)> {
    let size = u64::from(CHUNK_PAGES);
    let chunks = if places.is_empty() { 0..0 } else { places.start / size..places.end.div_ceil(size) };
    chunks.map(move |chunk| {
        let first = chunk * size;
        let from = places.start.max(first) - first;
        let to = places.end.min(first + size) - first;
        (chunk as usize, from as u32..to as u32)
    })
}

impl<P: PageNumber> Residency<P> {
    /// `len` pages from page 0 on that are all in `state`. Allocates 24 bytes for each 64 MiB of pages at once: bound a length
    /// that comes from outside first.
    pub fn uniform(len: u64, state: PageState) -> Self {
        let chunks = len.div_ceil(u64::from(CHUNK_PAGES)) as usize;
        Self { first: P::default(), len, chunks: vec![Chunk::Uniform(state); chunks] }
    }

    /// No pages yet; the one appended first will be `first`.
    pub fn starting_at(first: P) -> Self {
        Self { first, len: 0, chunks: Vec::new() }
    }

    /// The map that `runs` describe; they start at page 0 and follow one another, empty ones are allowed.
    ///
    /// # Errors
    /// [`ResidencyError::NotConsecutive`] if they do not, [`ResidencyError::TooLong`] beyond 256 TiB of pages.
    pub fn from_runs(runs: impl IntoIterator<Item = Run<P>>) -> Result<Self, ResidencyError> {
        let mut builder = Builder::starting_at(P::default());
        for Run { pages, state } in runs {
            if pages.start != builder.end() {
                let (expected, found) = (builder.end().number(), pages.start.number());
                return Err(ResidencyError::NotConsecutive { expected, found });
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
        self.set(self.first + start..self.first + self.len, state);
    }

    /// Appends all pages of `other`, which follow those here.
    pub fn append(&mut self, other: &Self) {
        debug_assert_eq!(self.pages().end, other.first, "pages would change their numbers");
        for run in other.runs() {
            self.push(run.pages.page_count(), run.state);
        }
    }

    /// These pages as a map of their own; what is not in this one is left out.
    #[must_use]
    pub fn part(&self, pages: Range<P>) -> Self {
        let pages = self.clip(pages);
        let mut part = Builder::starting_at(pages.start);
        self.runs_in(pages).for_each(|run| part.push(run.pages.page_count(), run.state));
        part.build()
    }

    /// The same states, counted in another way, in which the first page is called `first`.
    #[must_use]
    pub fn renumbered<Q: PageNumber>(self, first: Q) -> Residency<Q> {
        Residency { first, len: self.len, chunks: self.chunks }
    }

    /// Which pages these are.
    pub fn pages(&self) -> Range<P> {
        self.first..self.first + self.len
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no pages at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The state of `page`, or `None` if it is not in the map.
    pub fn get(&self, page: P) -> Option<PageState> {
        let place = page.number().checked_sub(self.first.number()).filter(|place| *place < self.len)?;
        let within = (place % u64::from(CHUNK_PAGES)) as u32;
        Some(self.chunks[chunk_of(place)].run_at(within).0)
    }

    /// Puts the pages of the range into `state`; those that are not in the map are ignored.
    pub fn set(&mut self, pages: Range<P>, state: PageState) {
        let places = self.places(pages);
        // Pages of the last chunk beyond the end may be anything, so a write up to the end fills the chunk:
        // a uniform map stays uniform.
        let to_chunk_end = places.end == self.len && !places.is_empty();
        let size = u64::from(CHUNK_PAGES);
        let end = if to_chunk_end { places.end.next_multiple_of(size) } else { places.end };
        for (chunk, pages) in by_chunk(places.start..end) {
            self.chunks[chunk].set(pages, state);
        }
    }

    /// How many pages are in each state.
    pub fn counts(&self) -> Counts {
        self.counts_in(self.pages())
    }

    /// How many pages of the range are in each state; those that are not in the map are ignored.
    pub fn counts_in(&self, pages: Range<P>) -> Counts {
        by_chunk(self.places(pages))
            .fold(Counts::default(), |sum, (chunk, pages)| sum + self.chunks[chunk].counts_in(pages))
    }

    /// Bytes this map has allocated.
    pub fn heap_bytes(&self) -> usize {
        let own = self.chunks.capacity() * size_of::<Chunk>();
        own + self.chunks.iter().map(Chunk::heap_bytes).sum::<usize>()
    }

    /// The pages of the range that are in the map.
    fn clip(&self, pages: Range<P>) -> Range<P> {
        let all = self.pages();
        pages.start.clamp(all.start, all.end)..pages.end.clamp(all.start, all.end)
    }

    /// Where in the chunks the pages of the range are that are in the map.
    fn places(&self, pages: Range<P>) -> Range<u64> {
        self.clip(pages).renumbered(self.first, 0)
    }
}

impl<P: PageNumber> PartialEq for Residency<P> {
    fn eq(&self, other: &Self) -> bool {
        // Runs, not chunks: the same content can be held in different forms.
        self.pages() == other.pages() && self.runs().eq(other.runs())
    }
}

impl<P: PageNumber> Eq for Residency<P> {}

impl<P: PageNumber> fmt::Debug for Residency<P> {
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

impl<P: PageNumber> From<Residency<P>> for Vec<(u64, PageState)> {
    fn from(residency: Residency<P>) -> Self {
        residency.runs().map(|run| (run.pages.page_count(), run.state)).collect()
    }
}

impl<P: PageNumber> TryFrom<Vec<(u64, PageState)>> for Residency<P> {
    type Error = ResidencyError;

    fn try_from(runs: Vec<(u64, PageState)>) -> Result<Self, ResidencyError> {
        let mut builder = Builder::starting_at(P::default());
        for (pages, state) in runs {
            push_bounded(&mut builder, pages, state)?;
        }
        Ok(builder.build())
    }
}
