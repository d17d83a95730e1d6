//! Guest RAM: sealed memfds, mapped shared, one a region.
//!
//! Everything that reads guest RAM goes through [`GuestRam::snapshot`], so that it leaves residency as it was.

mod error;
pub mod layout;
mod load;
mod missing;
pub mod page_set;
mod snapshot;
mod watch;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use memory_agent::{
    Counts, Hint, HintProbe, Mapping, PAGE_SIZE, Page, PageNumber, PageOutReport, PageRange, Residency, ScanGuard,
    ScanView, exact_probe,
};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

pub use error::RamError;
use layout::RegionPart;
pub use layout::{RamLayout, RamPage, RamRegion};
pub use missing::{MissingPages, MissingRam, NotLanded, why_no_faults};
pub use page_set::PageSet;
pub use snapshot::RamSnapshot;
pub use watch::RamWatch;

/// Guest memory whose writes by the monitor itself are logged, a bit a page.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;

/// Page ranges counted from a region's first page.
type LocalRanges = Vec<Range<Page>>;

/// Whoever reads pages for post-copy at the source.
pub trait ReadPages: Send + Sync {
    /// Reads a page into `bytes`, which has exactly its size, as [`GuestRam::read_through_file`] does.
    ///
    /// # Errors
    /// When it cannot be read, such as one whose swap device fails.
    fn read_page(&self, page: RamPage, bytes: &mut [u8]) -> Result<(), RamError>;
}

impl ReadPages for GuestRam {
    fn read_page(&self, page: RamPage, bytes: &mut [u8]) -> Result<(), RamError> {
        self.read_through_file(page.run(1), bytes)
    }
}

/// The memory of one machine.
pub struct GuestRam {
    memory: GuestMemory,
    layout: RamLayout,
    /// One a region, for those who read it.
    views: Vec<ScanView>,
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRam").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl GuestRam {
    /// Makes `bytes` of guest RAM, a multiple of the page size. Nothing is allocated until it is written.
    ///
    /// # Errors
    /// When the host refuses the memfds or the mapping.
    pub fn new(bytes: u64) -> Result<Self, RamError> {
        let layout = RamLayout::new(bytes);
        let mut regions = Vec::with_capacity(layout.regions().len());
        let mut views = Vec::with_capacity(layout.regions().len());
        for region in layout.regions() {
            let file = sealed_memfd(region.length)?;
            views.push(ScanView::new(file.as_fd(), region.length)?);
            let length = usize::try_from(region.length).map_err(|e| RamError::Map(e.to_string()))?;
            let page_size = std::num::NonZeroUsize::new(PAGE_SIZE as usize).unwrap_or(std::num::NonZeroUsize::MIN);
            let mapping = MmapRegionBuilder::new_with_bitmap(length, AtomicBitmap::new(length, page_size))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .with_file_offset(FileOffset::new(file, 0))
                .build()
                .map_err(|e| RamError::Map(e.to_string()))?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(region.start))
                .ok_or_else(|| RamError::Map("a region reaches behind the address space".into()))?;
            regions.push(region);
        }
        let memory = GuestMemory::from_regions(regions).map_err(|e| RamError::Map(e.to_string()))?;
        Ok(Self { memory, layout, views })
    }

    /// The memory as devices and loaders see it. Writes through it are logged.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where the memory lies.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.layout.pages()
    }

    /// All pages.
    pub fn all_pages(&self) -> Range<RamPage> {
        self.layout.all_pages()
    }

    /// The region's host virtual address, for the memory slot.
    pub(crate) fn host_address(&self, region: usize) -> Option<u64> {
        self.memory.iter().nth(region).map(|r| r.as_ptr() as u64)
    }

    /// Reads the pages of `pages` into `buffer`, which has exactly their size. Reading a hole allocates it and reading
    /// a swapped page swaps it in: ask [`GuestRam::snapshot`] first.
    ///
    /// # Errors
    /// When the range is not all RAM.
    pub fn read_pages(&self, pages: Range<RamPage>, buffer: &mut [u8]) -> Result<(), RamError> {
        self.check(&pages)?;
        let mut done = 0;
        for part in self.layout.split(pages.clone()) {
            let length = part.pages.byte_count() as usize;
            let address = self.layout.address_of(part.pages.start).unwrap_or_default();
            let place = &mut buffer[done..done + length];
            self.memory.read_slice(place, GuestAddress(address)).map_err(|e| RamError::Access {
                page: part.pages.start,
                what: "read",
                cause: io::Error::other(e.to_string()),
            })?;
            done += length;
        }
        Ok(())
    }

    /// Reads pages that were swapped when they were snapshot, through a mapping of the reader's own: see
    /// [`ScanView`].
    ///
    /// # Errors
    /// When the range is not all RAM.
    pub fn read_swapped(&self, pages: Range<RamPage>, buffer: &mut [u8]) -> Result<(), RamError> {
        self.check(&pages)?;
        let mut rest = buffer;
        for part in self.layout.split(pages) {
            let length = part.local.byte_count() as usize;
            let (place, behind) = rest.split_at_mut(length);
            self.view(part.region)?.read(&part.local, place)?;
            rest = behind;
        }
        Ok(())
    }

    /// Reads pages that are given back to the host behind it, through the file and not through a mapping: a hole stays one,
    /// and what is in no page table costs no flush when it goes.
    ///
    /// # Errors
    /// When the range is not all RAM.
    pub fn read_through_file(&self, pages: Range<RamPage>, buffer: &mut [u8]) -> Result<(), RamError> {
        self.check(&pages)?;
        let mut rest = buffer;
        for part in self.layout.split(pages) {
            let length = part.local.byte_count() as usize;
            let (place, behind) = rest.split_at_mut(length);
            self.file(part.region)?.read_exact_at(place, part.file_offset()).map_err(|cause| RamError::Access {
                page: part.pages.start,
                what: "read",
                cause,
            })?;
            rest = behind;
        }
        Ok(())
    }

    /// Writes `data`, whole pages, to the pages from `first` on, through the file and not through the mapping: a page
    /// that did not exist is allocated without a fault and without being cleared first.
    ///
    /// # Errors
    /// When the range is not all RAM, or the host has no memory.
    pub fn land_pages(&self, first: RamPage, data: &[u8]) -> Result<(), RamError> {
        let pages = first.run(data.len() as u64 / PAGE_SIZE);
        self.check(&pages)?;
        let mut done = 0;
        for part in self.layout.split(pages) {
            let length = part.local.byte_count() as usize;
            self.file(part.region)?
                .write_all_at(&data[done..done + length], part.file_offset())
                .map_err(|cause| RamError::Access { page: part.pages.start, what: "written", cause })?;
            done += length;
        }
        Ok(())
    }

    /// Makes holes of the pages: they read as zeros and take no memory.
    ///
    /// # Errors
    /// When the range is not all RAM.
    pub fn punch(&self, pages: Range<RamPage>) -> Result<(), RamError> {
        self.check(&pages)?;
        for part in self.layout.split(pages) {
            rustix::fs::fallocate(
                self.file(part.region)?,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                part.file_offset(),
                part.local.byte_count(),
            )
            .map_err(|e| RamError::Access { page: part.pages.start, what: "punched", cause: e.into() })?;
        }
        Ok(())
    }

    /// Makes holes of the whole pages in `bytes` bytes at a guest physical address, for a guest that has given them back, and logs
    /// that as the monitor's own writing: what is sent of them from now on is that they are holes. Gives the number of bytes.
    ///
    /// # Errors
    /// When it is not all RAM.
    pub fn discard(&self, start: GuestAddress, bytes: u64) -> Result<u64, RamError> {
        let end = start.0.saturating_add(bytes) / PAGE_SIZE * PAGE_SIZE;
        let Some(first) = start.0.checked_next_multiple_of(PAGE_SIZE).filter(|first| *first < end) else {
            return Ok(0);
        };
        let not_ram = || RamError::NotRam { start: first, end };
        let pages = self.layout.pages_of(first..end).ok_or_else(not_ram)?;
        let length = pages.byte_count();
        self.punch(pages)?;
        for slice in self.memory.get_slices(GuestAddress(first), length as usize) {
            let slice = slice.map_err(|_| not_ram())?;
            slice.bitmap().mark_dirty(0, slice.len());
        }
        Ok(length)
    }

    /// What each page of `pages` is. Changes nothing: no swap-in, no allocation.
    ///
    /// # Errors
    /// When the range is not all RAM or the host does not answer.
    pub fn residency(&self, pages: Range<RamPage>) -> Result<Residency<RamPage>, RamError> {
        self.check(&pages)?;
        let mut all = Residency::starting_at(pages.start);
        for part in self.layout.split(pages) {
            let found = exact_probe().residency(&self.mapping(part.region)?, part.local)?;
            all.append(&found.renumbered(part.pages.start));
        }
        Ok(all)
    }

    /// What a quick probe believes of all pages.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn hint(&self, probe: &dyn HintProbe) -> Result<Hint<RamPage>, RamError> {
        let mut all = Residency::default();
        for part in self.layout.parts() {
            let hint = probe.hint(&self.mapping(part.region)?, part.local)?;
            all.append(&hint.into_believed().renumbered(part.pages.start));
        }
        Ok(Hint::of(all))
    }

    /// What each page is, where `hint` is believed about pages that are there: those it leaves open, all holes among them,
    /// are looked at.
    ///
    /// # Errors
    /// When the hint is of other pages, or the host does not answer.
    pub fn resolve(&self, hint: Hint<RamPage>) -> Result<Residency<RamPage>, RamError> {
        if hint.pages() != self.all_pages() {
            return Err(RamError::OutOfRange { range: hint.pages(), pages: self.pages() });
        }
        let believed = hint.into_believed();
        let mut all = Residency::default();
        for part in self.layout.parts() {
            let hint = Hint::of(believed.part(part.pages.clone()).renumbered(part.local.start));
            let resolved = hint.resolve(&self.mapping(part.region)?, exact_probe())?;
            all.append(&resolved.renumbered(part.pages.start));
        }
        Ok(all)
    }

    /// How many pages are holes, resident and swapped, without asking page by page.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn counts(&self) -> Result<Counts, RamError> {
        let mut counts = Counts::default();
        for region in 0..self.layout.regions().len() {
            counts += memory_agent::counts_of(&self.mapping(region)?)?;
        }
        Ok(counts)
    }

    /// Pages out what is resident in the ranges.
    ///
    /// # Errors
    /// When the host cannot page out at all; pages that stayed are in the report.
    pub fn page_out(&self, ranges: &[Range<RamPage>]) -> Result<PageOutReport, RamError> {
        let mut report = PageOutReport::default();
        for (region, local) in self.by_region(ranges)? {
            report = report.merge(memory_agent::page_out(&self.mapping(region.region)?, &local)?);
        }
        Ok(report)
    }

    /// Pages out pages that have landed and that the guest has not touched yet.
    ///
    /// # Errors
    /// When the host cannot page out at all; pages that stayed are in the report.
    pub fn page_out_landed(&self, ranges: &[Range<RamPage>]) -> Result<PageOutReport, RamError> {
        let mut report = PageOutReport::default();
        for (region, local) in self.by_region(ranges)? {
            report = report.merge(self.view(region.region)?.page_out(&local)?);
        }
        Ok(report)
    }

    /// Remembers what each page of the ranges is, before somebody reads them with [`GuestRam::read_pages`].
    ///
    /// # Errors
    /// When a range is not all RAM or the host does not answer.
    pub fn snapshot(&self, ranges: &[Range<RamPage>]) -> Result<RamSnapshot<'_>, RamError> {
        RamSnapshot::new(self, ranges, |region| Ok(ScanGuard::new(self.mapping(region)?)))
    }

    /// Remembers what each page of the ranges is, before somebody reads those that are swapped with
    /// [`GuestRam::read_swapped`]. Pages in memory that the guest has not touched since are taken for swapped, and go too.
    ///
    /// # Errors
    /// When a range is not all RAM or the host does not answer.
    pub fn snapshot_swapped(&self, ranges: &[Range<RamPage>]) -> Result<RamSnapshot<'_>, RamError> {
        RamSnapshot::new(self, ranges, |region| Ok(self.view(region)?.guard()))?.with_strays(self)
    }

    /// The pages written through [`GuestRam::memory`] since the last call.
    pub fn take_own_writes(&self) -> PageSet {
        let mut set = PageSet::new(self.pages());
        for (part, r) in self.layout.parts().zip(self.memory.iter()) {
            // Regions are multiples of 64 pages but for a last one that is smaller, so words line up.
            set.insert_words(part.pages.start, &r.bitmap_words());
        }
        set
    }

    /// The regions as the memory agent sees them, in order.
    ///
    /// # Errors
    /// When the host refuses to be asked about them.
    pub fn mappings(&self) -> Result<Vec<Mapping<'_>>, RamError> {
        (0..self.layout.regions().len()).map(|region| self.mapping(region)).collect()
    }

    fn no_region(&self) -> RamError {
        RamError::OutOfRange { range: RamPage(0).run(0), pages: self.pages() }
    }

    fn mapping(&self, region: usize) -> Result<Mapping<'_>, RamError> {
        let r = self.memory.iter().nth(region).ok_or_else(|| self.no_region())?;
        Ok(Mapping::new(self.file(region)?.as_fd(), 0, r.as_ptr() as usize, r.len())?)
    }

    fn view(&self, region: usize) -> Result<&ScanView, RamError> {
        self.views.get(region).ok_or_else(|| self.no_region())
    }

    fn file(&self, region: usize) -> Result<&File, RamError> {
        self.memory
            .iter()
            .nth(region)
            .and_then(|r| r.file_offset())
            .map(FileOffset::file)
            .ok_or_else(|| self.no_region())
    }

    /// The ranges, split into regions: for each region that has any, its local ranges.
    fn by_region(&self, ranges: &[Range<RamPage>]) -> Result<Vec<(RegionPart, LocalRanges)>, RamError> {
        let mut regions: Vec<_> = self.layout.parts().map(|region| (region, Vec::new())).collect();
        for range in ranges {
            self.check(range)?;
            for part in self.layout.split(range.clone()) {
                regions[part.region].1.push(part.local);
            }
        }
        regions.retain(|(_, ranges)| !ranges.is_empty());
        Ok(regions)
    }

    fn check(&self, range: &Range<RamPage>) -> Result<(), RamError> {
        if range.start <= range.end && range.end <= self.all_pages().end {
            Ok(())
        } else {
            Err(RamError::OutOfRange { range: range.clone(), pages: self.pages() })
        }
    }
}

/// The words of a region's log of the monitor's own writes, taken and cleared.
trait BitmapWords {
    fn bitmap_words(&self) -> Vec<u64>;
}

impl BitmapWords for GuestRegionMmap<AtomicBitmap> {
    fn bitmap_words(&self) -> Vec<u64> {
        use std::ops::Deref;
        self.deref().bitmap().get_and_reset()
    }
}

/// A memfd of `length` bytes that can neither shrink nor grow, so that no access to the mapping can fault.
fn sealed_memfd(length: u64) -> Result<File, RamError> {
    let create = |call, e: rustix::io::Errno| RamError::Create { call, cause: e.into() };
    let fd = rustix::fs::memfd_create("thermocline-guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|e| create("memfd_create", e))?;
    rustix::fs::ftruncate(&fd, length).map_err(|e| create("ftruncate", e))?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|e| create("fcntl(F_ADD_SEALS)", e))?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use memory_agent::PageState;

    use super::*;

    #[test]
    fn what_lands_is_read_and_a_punched_page_is_a_hole() {
        let ram = GuestRam::new(1 << 20).unwrap();
        assert_eq!(ram.residency(ram.all_pages()).unwrap().counts(), Counts { hole: 256, resident: 0, swapped: 0 });
        ram.land_pages(RamPage(7), &[0xa5; 8192]).unwrap();
        let mut buffer = [0; 8192];
        ram.read_pages(RamPage(7).run(2), &mut buffer).unwrap();
        assert_eq!(buffer, [0xa5; 8192]);
        assert_eq!(ram.counts().unwrap(), Counts { hole: 254, resident: 2, swapped: 0 });
        ram.punch(RamPage(7).run(1)).unwrap();
        assert_eq!(ram.counts().unwrap(), Counts { hole: 255, resident: 1, swapped: 0 });
    }

    #[test]
    fn what_only_a_reader_has_woken_is_asleep() {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.land_pages(RamPage(0), &[0xa5; 64 * 4096]).unwrap();
        // The guest's own touch is what counts, and there is none yet.
        let mut byte = [0];
        ram.memory().read_slice(&mut byte, GuestAddress(3 * 4096)).unwrap();
        let asleep = ram.snapshot_swapped(&[RamPage(0).run(64)]).unwrap();
        let awake: u64 = asleep
            .runs()
            .filter(|run| run.state == PageState::Resident)
            .map(|run| {
                assert!(run.pages.start <= RamPage(3), "{run:?}");
                run.pages.page_count()
            })
            .sum();
        // A fault maps neighbours that are in memory: 16 pages (fault_around_bytes).
        assert!((1..=16).contains(&awake), "{awake} pages");
    }

    #[test]
    fn own_writes_are_logged_once() {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.memory().write_slice(&[1; 4097], GuestAddress(4096)).unwrap();
        assert_eq!(ram.take_own_writes().runs().collect::<Vec<_>>(), [RamPage(1).run(2)]);
        assert!(ram.take_own_writes().is_empty());
    }

    #[test]
    fn what_a_guest_gives_back_is_a_hole_and_logged() {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.land_pages(RamPage(0), &[0xa5; 8 * 4096]).unwrap();
        assert_eq!(ram.discard(GuestAddress(4095), 3 * 4096).unwrap(), 2 * 4096, "whole pages alone");
        assert_eq!(ram.counts().unwrap(), Counts { hole: 250, resident: 6, swapped: 0 });
        assert_eq!(ram.take_own_writes().runs().collect::<Vec<_>>(), [RamPage(1).run(2)]);
        assert_eq!(ram.discard(GuestAddress(5), 4000).unwrap(), 0);
        assert_eq!(ram.discard(GuestAddress(u64::MAX - 4096), 4000).unwrap_or(0), 0);
        assert_eq!(ram.discard(GuestAddress(u64::MAX - 1), 4000).unwrap(), 0);
        assert!(ram.discard(GuestAddress((1 << 20) - 4096), 8192).is_err());
    }

    #[test]
    fn what_a_guest_gives_back_is_in_one_piece_of_its_addresses() {
        let ram = GuestRam::new((3 << 30) + (1 << 20)).unwrap();
        assert!(ram.discard(GuestAddress((3 << 30) - 4096), (1 << 30) + 8192).is_err(), "the gap is no RAM");
        assert_eq!(ram.discard(GuestAddress(4 << 30), 8192).unwrap(), 8192);
    }

    #[test]
    fn ranges_behind_the_end_are_refused() {
        let ram = GuestRam::new(1 << 20).unwrap();
        assert!(matches!(ram.residency(RamPage(0).run(257)), Err(RamError::OutOfRange { .. })));
        assert!(matches!(ram.land_pages(RamPage(256), &[0; 4096]), Err(RamError::OutOfRange { .. })));
        assert!(matches!(ram.punch(RamPage::range(255..300)), Err(RamError::OutOfRange { .. })));
    }

    #[test]
    fn the_memory_cannot_be_resized() {
        let ram = GuestRam::new(1 << 20).unwrap();
        assert!(ram.file(0).unwrap().set_len(4096).is_err());
    }
}
