//! Finding out which pages are holes, resident or swapped, without changing it.

mod choice;
mod exact_scan;
mod hint;
mod in_memory;
mod marker;
mod page_cache;
mod swap_cache;
mod table_scan;
mod trial;
mod uffd_marker;

use std::io;
use std::ops::Range;

use thiserror::Error;

use crate::memory::{Target, TargetError};
use crate::residency::Residency;
pub use choice::{ChosenProbe, KernelOffer, ProbeChoice, ProbeKind, exact_probe};
pub use exact_scan::ExactScan;
pub use hint::Hint;
pub(crate) use in_memory::{present, resident_runs};
pub use marker::Marker;
pub(crate) use marker::mapped;
pub use page_cache::{PageCache, PageCacheBySeek};
pub(crate) use swap_cache::{evicted, take_swap_cache};
pub use uffd_marker::UffdMarker;

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
    /// The target is not what it was.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The probe wanted cannot be had.
    #[error("the probe {probe} cannot be used: {why}")]
    NotHere {
        /// Which.
        probe: ProbeKind,
        /// Why, and what to do.
        why: &'static str,
    },
    /// A system call failed.
    #[error("{call} failed on pages {pages:?}: {cause}; check that the file is still mapped there, whole")]
    System {
        /// The call.
        call: &'static str,
        /// What it was asked about.
        pages: Range<u64>,
        /// The system's reason.
        cause: io::Error,
    },
}

/// A way to find out the states of pages, exactly: each page was in the state reported at some moment during the call.
pub trait Probe: Send + Sync {
    /// A short name for logs and tables.
    fn name(&self) -> &'static str;

    /// The states of `pages` of the target.
    ///
    /// # Errors
    /// [`ProbeError`] when the pages are not in the target, or the kernel refuses.
    fn residency(&self, target: &dyn Target, pages: Range<u64>) -> Result<Residency, ProbeError>;
}

/// A quick way to guess the states of pages.
pub trait HintProbe: Send + Sync {
    /// A short name for logs and tables.
    fn name(&self) -> &'static str;

    /// What the states of `pages` of the target may be; page 0 of the answer is `pages.start`.
    ///
    /// # Errors
    /// [`ProbeError`] when the pages are not in the target, or the kernel refuses.
    fn hint(&self, target: &dyn Target, pages: Range<u64>) -> Result<Hint, ProbeError>;

    /// Prepares pages that have come into memory since the last call for being told of later; where nothing is to be
    /// prepared, this does nothing.
    ///
    /// # Errors
    /// [`ProbeError`] when the kernel refuses.
    fn arm(&self) -> Result<(), ProbeError> {
        Ok(())
    }
}

pub(crate) fn check_range(target: &dyn Target, pages: &Range<u64>) -> Result<(), ProbeError> {
    let mapping = target.mapping();
    if mapping.contains(pages) {
        return Ok(());
    }
    Err(ProbeError::OutOfRange { asked: pages.clone(), pages: mapping.pages() })
}
