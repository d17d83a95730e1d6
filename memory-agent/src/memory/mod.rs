//! Shared memory that can be asked about and paged out: one's own mapping, or another process's.

mod file_view;
mod mapped_file;
mod mapping;
mod maps;
mod process;
mod process_memory;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use crate::page_state::PAGE_SIZE;
pub use file_view::FileView;
pub use mapping::Mapping;
pub use process::{LeftOut, Process, SharedMemory};
pub use process_memory::ProcessMemory;

/// Why memory cannot be looked at.
#[derive(Debug, Error)]
pub enum TargetError {
    /// Address, offset or length is not a whole number of pages, or there are no pages.
    #[error("{what} {value:#x} is not a positive number of whole {PAGE_SIZE}-byte pages: align it")]
    Unaligned {
        /// Which of the three.
        what: &'static str,
        /// Its value, in bytes.
        value: u64,
    },
    /// The range wraps around the address space or the largest file.
    #[error("{length:#x} bytes from {start:#x} on do not fit the address space: shorten the mapping")]
    Overflow {
        /// First address or file offset.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// The file ends before the mapping.
    #[error(
        "the mapping needs {needed} bytes of the file, which has {size}: map no more than the file, or enlarge it first"
    )]
    PastEnd {
        /// Bytes up to the end of the mapping.
        needed: u64,
        /// Bytes in the file.
        size: u64,
    },
    /// Not a memfd or a file in tmpfs, or one of huge pages, which are never swapped.
    #[error("the file is not swappable shared memory: use a memfd (without MFD_HUGETLB) or a file in tmpfs")]
    NotSharedMemory,
    /// The kernel hides residency from those who may not write the file (mm/mincore.c `can_do_mincore`).
    #[error(
        "this user may not write the file, so the kernel would call every page resident: run as its owner, or as root outside of user namespaces"
    )]
    NotWritable,
    /// The host's pages are of another size.
    #[error("this host has pages of {0} bytes, only hosts with {PAGE_SIZE} are supported")]
    PageSize(usize),
    /// No descriptor or mapping of the process is a shared memory file of that name.
    #[error("process {pid} has no shared memory file whose name contains {name:?}: see `ls -l /proc/{pid}/fd`")]
    NotFound {
        /// The process.
        pid: u32,
        /// What the name should contain.
        name: String,
    },
    /// There is no such process.
    #[error("there is no process {0}: check the number, such as with `pgrep -a qemu`")]
    NoProcess(u32),
    /// The process has ended.
    #[error("process {0} has ended")]
    Exited(u32),
    /// The process does not map the memory any more where it did.
    #[error(
        "process {pid} no longer maps {name} at {address:#x}: it has executed another program or changed its mappings; start again"
    )]
    Remapped {
        /// The process.
        pid: u32,
        /// The memory file's name.
        name: String,
        /// Where it was mapped.
        address: u64,
    },
    /// A right is missing.
    #[error("this user may not {what} of process {pid}: run as root, or with {capability}")]
    NoRight {
        /// What was refused.
        what: &'static str,
        /// The process.
        pid: u32,
        /// What permits it.
        capability: &'static str,
    },
    /// The kernel has no such call, or a seccomp filter hides it.
    #[error("there is no {call} here: it needs Linux {since} and a seccomp filter that permits it")]
    NoCall {
        /// The call.
        call: &'static str,
        /// The first version that has it.
        since: &'static str,
    },
    /// A file could not be opened, examined or mapped.
    #[error("cannot {what} {path}: {cause}; check that it exists and that this user may write it")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
}

/// Shared memory that a process works with.
///
/// Pages are numbered from 0 at the first byte of [`Target::mapping`].
pub trait Target: Send + Sync {
    /// The memory in this process: for questions to the page cache. Of another process's memory it is a mapping that
    /// nobody ever touches.
    fn mapping(&self) -> Mapping<'_>;

    /// The memory's file, mapped for readers, with nothing of it touched.
    ///
    /// # Errors
    /// [`TargetError`] when it cannot be mapped.
    fn view(&self) -> Result<Arc<FileView>, TargetError>;

    /// The page tables of the process that works with the memory.
    ///
    /// # Errors
    /// [`TargetError`] when they cannot be read.
    fn page_tables(&self) -> Result<PageTables, TargetError>;

    /// The process that works with the memory.
    fn pid(&self) -> u32;

    /// Whether that is another process, so that [`Target::mapping`] maps nothing.
    fn is_elsewhere(&self) -> bool;

    /// Whether the process still has the memory where it was: what was learnt before this is then true of it.
    ///
    /// # Errors
    /// [`TargetError`] when it has ended or maps something else.
    fn check(&self) -> Result<(), TargetError>;

    /// Asks the kernel to page out what the process maps of these pages. That it happened is not said.
    ///
    /// # Errors
    /// [`TargetError`] when the kernel refuses to be asked.
    fn advise_page_out(&self, ranges: &[Range<u64>]) -> Result<(), TargetError>;

    /// The same for pages that hold data, such as those that were swapped a while ago: where the process is another one, this
    /// costs it and us less. A page that nobody has written yet would count as written.
    ///
    /// # Errors
    /// [`TargetError`] when the kernel refuses to be asked.
    fn advise_restore(&self, ranges: &[Range<u64>]) -> Result<(), TargetError> {
        self.advise_page_out(ranges)
    }

    /// Has the process's page tables map these pages, as a read would: swaps in, and allocates holes.
    ///
    /// # Errors
    /// [`TargetError`] when it cannot be done.
    fn map_pages(&self, pages: &Range<u64>) -> Result<(), TargetError>;
}

/// The page tables of a process, where they map a target's pages.
#[derive(Clone, Debug)]
pub struct PageTables {
    /// `/proc/PID/pagemap`.
    pub(crate) pagemap: Arc<File>,
    /// Of page 0 in that process.
    pub(crate) address: u64,
}

impl PageTables {
    /// The addresses of pages.
    pub(crate) fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        self.address + pages.start * PAGE_SIZE..self.address + pages.end * PAGE_SIZE
    }

    /// The page at an address.
    pub(crate) fn page_at(&self, address: u64) -> u64 {
        address.saturating_sub(self.address) / PAGE_SIZE
    }
}

fn io_error(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> TargetError {
    let path = path.into();
    move |cause| TargetError::Io { what, path, cause }
}
