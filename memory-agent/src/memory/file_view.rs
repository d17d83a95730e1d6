//! A shared memory file of another process.

use std::fs::{File, OpenOptions, read_dir, read_link};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{SealFlags, fcntl_get_seals};

use super::{Mapping, Target, TargetError, io_error};
use crate::page_number::{FilePage, PageNumber};
use crate::page_range::PageRange;
use crate::page_state::PAGE_SIZE;
use crate::sys::SharedMap;
use crate::sys::pins::Pins;

/// A shared memory file, mapped here for reading only: another process's, or one's own for readers.
///
/// Its pages can be asked about, read, and paged out again as long as nobody else has them mapped: the kernel leaves
/// alone what two mappings hold. So whatever the owner touches meanwhile stays. And it is quicker than through a mapping
/// that writes: the kernel need not flush other CPUs' address translations for each page that it writes out
/// (mm/vmscan.c `pageout`, `try_to_unmap_flush_dirty`).
#[derive(Debug)]
pub struct FileView {
    file: File,
    map: SharedMap,
    /// A second mapping, to pin pages through; made when it is first needed, if it can be.
    pinning: OnceLock<Option<SharedMap>>,
}

impl FileView {
    /// Opens a shared memory file by a path such as `/proc/PID/fd/N` and maps all of it.
    ///
    /// # Errors
    /// [`TargetError`] when it cannot be opened for reading and writing, or is not shared memory.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TargetError> {
        let path = path.as_ref();
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io_error("open", path))?;
        Self::whole(file, path)
    }

    /// Maps all of a file, that errors call `path`.
    pub(super) fn whole(file: File, path: &Path) -> Result<Self, TargetError> {
        let size = file.metadata().map_err(io_error("examine", path))?.len();
        Self::new(file, size / PAGE_SIZE * PAGE_SIZE)
    }

    /// Maps the first `length` bytes of a shared memory file.
    ///
    /// # Errors
    /// [`TargetError`] when it is not shared memory, or has not so many whole pages.
    pub fn new(file: File, length: u64) -> Result<Self, TargetError> {
        let what = "the shared memory file";
        if length == 0 {
            return Err(TargetError::Unaligned { what: "file size", value: length });
        }
        let map = SharedMap::new(file.as_fd(), length as usize).map_err(io_error("map", what))?;
        let view = Self { file, map, pinning: OnceLock::new() };
        Mapping::new(view.file.as_fd(), 0, view.map.address(), length)?;
        Ok(view)
    }

    /// Copies what the pages hold now; `buffer` has exactly their size. Swapped pages are swapped in: have a guard
    /// take a snapshot of them first. Holes read as zeros and stay holes.
    ///
    /// # Errors
    /// [`TargetError::Io`] when not all pages are in the file, or the buffer is of another size.
    pub fn read(&self, pages: &Range<FilePage>, buffer: &mut [u8]) -> Result<(), TargetError> {
        if pages.byte_count() != buffer.len() as u64 {
            return Err(io_error("read", "the shared memory file")(std::io::ErrorKind::InvalidInput.into()));
        }
        let read = self.file.read_exact_at(buffer, pages.start.number().saturating_mul(PAGE_SIZE));
        read.map_err(io_error("read", "the shared memory file"))
    }

    /// Pages out what another process has mapped and that holds data; `unmap` is to have that process's page tables let go of
    /// all pages that it can. Fails where pages cannot be pinned.
    ///
    /// Asked to page out what such a process maps, the kernel interrupts that process's CPUs for every page (a page read
    /// through a mapping that may write has a dirty entry, mm/memory.c `set_pte_range`, and must be flushed from all CPUs
    /// before it is written, mm/vmscan.c `try_to_unmap_flush_dirty`). Pages that are pinned it unmaps, flushes together and
    /// then keeps (`folio_maybe_dma_pinned`). What is unmapped goes by this view, without interrupting anybody.
    pub(crate) fn page_out_of(
        &self,
        ranges: &[Range<FilePage>],
        unmap: impl FnOnce() -> Result<(), TargetError>,
    ) -> Result<(), TargetError> {
        let length = self.map.length();
        let pinning = self.pinning.get_or_init(|| SharedMap::writable(self.file.as_fd(), length).ok());
        let refused = |e| io_error("pin pages of", "the shared memory file")(e);
        let pinning = pinning.as_ref().ok_or_else(|| refused(std::io::ErrorKind::PermissionDenied.into()))?;
        let pins = Pins::take(pinning, ranges).map_err(refused)?;
        for range in ranges {
            // What two processes have mapped would stay.
            pinning.unmap(range).map_err(|e| refused(e.into()))?;
        }
        let unmapped = unmap();
        drop(pins);
        unmapped?;
        let mapping = self.mapping();
        let own: Vec<_> = ranges.iter().map(|range| mapping.of_file(range)).collect();
        let mapped = own.iter().try_for_each(|range| mapping.map_pages(range));
        let advised = mapped.and_then(|()| mapping.advise_page_out(&own));
        // In any case: what this view went on mapping, nobody could page out any more.
        self.unmap(ranges)?;
        advised
    }

    /// Takes pages out of this view's page tables, so that nobody but the owner maps them; and neighbours that the kernel has
    /// mapped with them (mm/memory.c `do_fault_around`: 64 KiB, aligned).
    pub(crate) fn unmap(&self, ranges: &[Range<FilePage>]) -> Result<(), TargetError> {
        const AROUND: u64 = 16;
        let all = self.mapping().all_in_file();
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let pages = range.numbers();
            let around = FilePage::range(pages.start / AROUND * AROUND..pages.end.next_multiple_of(AROUND));
            self.map
                .unmap(&around.intersection(&all))
                .map_err(|e| io_error("unmap", "the shared memory file")(e.into()))?;
        }
        Ok(())
    }

    /// Whether the file cannot get shorter.
    pub(crate) fn is_sealed(&self) -> bool {
        fcntl_get_seals(&self.file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
    }

    pub(crate) fn map(&self) -> &SharedMap {
        &self.map
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
