//! What can go wrong with guest RAM.

use std::io;
use std::ops::Range;

use super::RamPage;

/// What can go wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The memfd could not be made.
    #[error("no memory for the guest: {call} failed: {cause}")]
    Create {
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The memory could not be mapped.
    #[error("guest RAM could not be mapped: {0}")]
    Map(String),
    /// A page range reaches behind the end of guest RAM.
    #[error("pages {} to {} are not all guest RAM, which has {pages} pages", range.start, range.end)]
    OutOfRange {
        /// What was asked for.
        range: Range<RamPage>,
        /// How much there is.
        pages: u64,
    },
    /// Guest physical addresses without RAM.
    #[error("guest physical addresses {start:#x} to {end:#x} are not all guest RAM")]
    NotRam {
        /// The first.
        start: u64,
        /// The first behind.
        end: u64,
    },
    /// What is to be put into RAM cannot be read.
    #[error("it cannot be read: {0}")]
    Source(io::Error),
    /// Reading or writing a page failed.
    #[error("guest RAM page {page} could not be {what}: {cause}")]
    Access {
        /// The first page of the access.
        page: RamPage,
        /// `read`, `written` or `punched`.
        what: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
    /// A page that is to come later is there, and cannot be given back.
    #[error(
        "guest RAM page {0} is to come later, and the host does not let go of what it has in its place: huge pages of shared memory reach into it; write never to /sys/kernel/mm/transparent_hugepage/shmem_enabled, and try again"
    )]
    NoHole(RamPage),
    /// Handling the guest's page faults failed.
    #[error(transparent)]
    Fault(#[from] memory_agent::FaultError),
    /// Asking the host about pages failed.
    #[error(transparent)]
    Probe(#[from] memory_agent::ProbeError),
    /// Paging out failed.
    #[error(transparent)]
    PageOut(#[from] memory_agent::PageOutError),
    /// Scanning failed.
    #[error(transparent)]
    Scan(#[from] memory_agent::ScanError),
    /// Counting failed.
    #[error(transparent)]
    Usage(#[from] memory_agent::UsageError),
    /// A region cannot be described to the memory agent.
    #[error(transparent)]
    Target(#[from] memory_agent::TargetError),
}

impl RamError {
    /// Why pages could not be paged out, if that is what failed: what is in them is whole.
    pub fn page_out(&self) -> Option<&memory_agent::PageOutError> {
        match self {
            Self::PageOut(e) | Self::Scan(memory_agent::ScanError::PageOut(e)) => Some(e),
            _ => None,
        }
    }
}
