//! Shared memory that can be asked about: one's own mapping, or a view of another process's memfd.

use std::fs::{File, OpenOptions, read_dir, read_link};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Stat, fstat, fstatfs};
use thiserror::Error;

use crate::page_state::PAGE_SIZE;
use crate::sys::SharedMap;

/// File system type of a memfd and of tmpfs (include/uapi/linux/magic.h `TMPFS_MAGIC`).
const TMPFS_MAGIC: i64 = 0x0102_1994;

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
        "this user may not write the file, so the kernel would call every page resident: run as its owner or as root"
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
    /// A file could not be opened, examined or mapped.
    #[error("cannot {what} {path}: {source}; check that it exists and that this user may write it")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

fn io_error(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> TargetError {
    let path = path.into();
    move |source| TargetError::Io { what, path, source }
}

/// An existing `MAP_SHARED` mapping of a shared memory file in this process.
///
/// Pages are numbered from 0 at the mapping's first byte. Making one is safe whatever the numbers are, since
/// nothing behind the address is ever read or written by this crate: the kernel is only asked about it, or
/// advised to map or page out. If the file is not what is mapped there, the answers are of no use, no more.
///
/// Probing moves the file offset of the descriptor (`SEEK_DATA`). Several probes at a time are no danger to one
/// another, because what they ask does not depend on the offset; a user of the same open file must not depend
/// on it either, and use `pread` and `pwrite`.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'fd> {
    fd: BorrowedFd<'fd>,
    file_offset: u64,
    address: usize,
    length: u64,
}

impl<'fd> Mapping<'fd> {
    /// A mapping of `length` bytes of `fd` from `file_offset` (bytes) on, at the host virtual `address`.
    ///
    /// # Errors
    /// [`TargetError`] when the numbers are not aligned, or the file is too short, not shared memory, or not
    /// writable for this user.
    pub fn new(fd: BorrowedFd<'fd>, file_offset: u64, address: usize, length: u64) -> Result<Self, TargetError> {
        let page_size = rustix::param::page_size();
        if page_size as u64 != PAGE_SIZE {
            return Err(TargetError::PageSize(page_size));
        }
        for (what, value, zero_allowed) in
            [("file offset", file_offset, true), ("address", address as u64, false), ("length", length, false)]
        {
            if value % PAGE_SIZE != 0 || value == 0 && !zero_allowed {
                return Err(TargetError::Unaligned { what, value });
            }
        }
        if (address as u64).checked_add(length).is_none_or(|end| end > isize::MAX as u64) {
            return Err(TargetError::Overflow { start: address as u64, length });
        }
        let needed = file_offset.checked_add(length).filter(|&end| end <= i64::MAX as u64);
        let needed = needed.ok_or(TargetError::Overflow { start: file_offset, length })?;

        let file_system = fstatfs(fd).map_err(|e| io_error("examine", "the mapped file")(e.into()))?;
        if file_system.f_type != TMPFS_MAGIC {
            return Err(TargetError::NotSharedMemory);
        }
        let stat = fstat(fd).map_err(|e| io_error("examine", "the mapped file")(e.into()))?;
        let size = stat.st_size.max(0) as u64;
        if size < needed {
            return Err(TargetError::PastEnd { needed, size });
        }
        if !may_write(&stat) {
            return Err(TargetError::NotWritable);
        }
        Ok(Self { fd, file_offset, address, length })
    }

    /// A mapping of our own of a file's beginning, known to be as it should.
    pub(crate) fn of_map(fd: BorrowedFd<'fd>, map: &SharedMap) -> Self {
        Self { fd, file_offset: 0, address: map.address(), length: map.length() as u64 }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.length / PAGE_SIZE
    }

    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'fd> {
        self.fd
    }

    /// Host virtual address of the first byte of `page`, or `None` beyond the end.
    pub fn address_of(&self, page: u64) -> Option<usize> {
        (page < self.pages()).then(|| self.address + (page * PAGE_SIZE) as usize)
    }

    /// Offset in the file, in bytes, of the first byte of `page`, or `None` beyond the end.
    pub fn file_offset_of(&self, page: u64) -> Option<u64> {
        (page < self.pages()).then(|| self.file_offset + page * PAGE_SIZE)
    }

    /// Whether all pages of the range exist.
    pub(crate) fn contains(&self, pages: &Range<u64>) -> bool {
        pages.start <= pages.end && pages.end <= self.pages()
    }

    /// Address and length in bytes of pages that exist.
    pub(crate) fn bytes(&self, pages: &Range<u64>) -> (usize, usize) {
        let address = self.address + (pages.start * PAGE_SIZE) as usize;
        (address, ((pages.end - pages.start) * PAGE_SIZE) as usize)
    }

    /// Offset in the file of a page, or of the end.
    pub(crate) fn offset(&self, page: u64) -> u64 {
        self.file_offset + page * PAGE_SIZE
    }

    /// The page at or after an offset in the file.
    pub(crate) fn page_at(&self, offset: u64) -> u64 {
        offset.saturating_sub(self.file_offset) / PAGE_SIZE
    }
}

/// Whether this user may write the file, as the kernel sees it for `mincore` and `MADV_PAGEOUT`: by owner and
/// mode of the file, not by how the descriptor was opened.
fn may_write(stat: &Stat) -> bool {
    let user = rustix::process::geteuid();
    user.is_root() || user.as_raw() == stat.st_uid || stat.st_mode & 0o002 != 0
}

/// A shared memory file of another process, mapped here and never touched, so that its pages can be asked
/// about. Paging out through it does not work as long as the other process has the pages mapped, because the
/// kernel leaves pages that two mappings hold alone.
#[derive(Debug)]
pub struct FileView {
    file: File,
    map: SharedMap,
}

impl FileView {
    /// Opens a shared memory file by a path such as `/proc/PID/fd/N` and maps all of it.
    ///
    /// # Errors
    /// [`TargetError`] when it cannot be opened for reading and writing, or is not shared memory.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TargetError> {
        let path = path.as_ref();
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io_error("open", path))?;
        let size = file.metadata().map_err(io_error("examine", path))?.len();
        let length = size / PAGE_SIZE * PAGE_SIZE;
        if length == 0 {
            return Err(TargetError::Unaligned { what: "file size", value: size });
        }
        let map = SharedMap::new(file.as_fd(), length as usize).map_err(io_error("map", path))?;
        let view = Self { file, map };
        Mapping::new(view.file.as_fd(), 0, view.map.address(), length)?;
        Ok(view)
    }

    /// Opens the largest shared memory file of a process whose name contains `name_contains`, such as
    /// `"memfd:"` or QEMU's memory object's name; found among its open files, then among its mappings.
    ///
    /// # Errors
    /// [`TargetError::NotFound`] when there is none, others as for [`FileView::open`].
    pub fn of_process(pid: u32, name_contains: &str) -> Result<Self, TargetError> {
        for links in ["fd", "map_files"] {
            let directory = PathBuf::from(format!("/proc/{pid}/{links}"));
            if let Some(path) = largest_shared_file(&directory, name_contains)? {
                return Self::open(path);
            }
        }
        Err(TargetError::NotFound { pid, name: name_contains.to_owned() })
    }

    /// The mapping to probe.
    pub fn mapping(&self) -> Mapping<'_> {
        Mapping::of_map(self.file.as_fd(), &self.map)
    }
}

/// Among the links in a `/proc` directory, the one to the largest regular file in shared memory whose target
/// contains `name`. Links that vanish meanwhile are left out: the process is running.
fn largest_shared_file(directory: &Path, name: &str) -> Result<Option<PathBuf>, TargetError> {
    let entries = read_dir(directory).map_err(io_error("list", directory))?;
    let candidates = entries.flatten().map(|entry| entry.path()).filter_map(|path| {
        let target = read_link(&path).ok()?;
        let target = target.to_string_lossy();
        let shared = target.starts_with("/memfd:") || target.starts_with("/dev/shm/");
        let metadata = path.metadata().ok().filter(|m| m.is_file())?;
        (shared && target.contains(name)).then_some((metadata.len(), path))
    });
    Ok(candidates.max_by_key(|(size, _)| *size).map(|(_, path)| path))
}
