//! Finding out which pages are holes, resident or swapped, without changing it.

mod in_memory;
mod page_cache;

use std::io;
use std::ops::Range;

use thiserror::Error;

use crate::residency::Residency;
use crate::target::Mapping;
pub(crate) use in_memory::resident_runs;
pub use page_cache::{PageCache, PageCacheBySeek};

/// How far a probe's answer can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// Each page was in the state reported at some moment during the call.
    Exact,
    /// Pages can be in another state than reported; good for choosing where to look.
    Hint,
}

/// Why pages could not be asked about.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// The pages are not all in the mapping.
    #[error("pages {asked:?} are not all within the mapping's {pages} pages: ask about existing pages")]
    OutOfRange {
        /// Pages asked for.
        asked: Range<u64>,
        /// Pages there are.
        pages: u64,
    },
    /// A system call failed.
    #[error("{call} failed on pages {pages:?}: {source}; check that the file is still mapped there, whole")]
    System {
        /// The call.
        call: &'static str,
        /// What it was asked about.
        pages: Range<u64>,
        /// The system's reason.
        source: io::Error,
    },
}

/// A way to find out the states of pages.
pub trait Probe {
    /// A short name for logs and tables.
    fn name(&self) -> &'static str;

    /// How far its answers can be trusted.
    fn certainty(&self) -> Certainty;

    /// The states of `pages` of the mapping; page 0 of the answer is `pages.start`.
    ///
    /// # Errors
    /// [`ProbeError`] when the pages are not in the mapping, or the kernel refuses.
    fn residency(&self, mapping: &Mapping<'_>, pages: Range<u64>) -> Result<Residency, ProbeError>;
}

pub(crate) fn check_range(mapping: &Mapping<'_>, pages: &Range<u64>) -> Result<(), ProbeError> {
    if mapping.contains(pages) {
        return Ok(());
    }
    Err(ProbeError::OutOfRange { asked: pages.clone(), pages: mapping.pages() })
}
