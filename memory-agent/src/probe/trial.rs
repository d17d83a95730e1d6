//! What this host's kernel does, found out by trying it on a few pages of one's own.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use rustix::io::Errno;

use super::table_scan::{Kernel, Scan, entries_from};
use super::{HintProbe, Marker, PageCacheBySeek, Probe};
use crate::memory::{Mapping, PageTables, Target};
use crate::page_range::PageRange;
use crate::page_state::{PAGE_SIZE, PageState};
use crate::residency::Residency;
use crate::swap;
use crate::sys::pagemap::{self, PAGE_IS_SWAPPED, PageRegion, Source, Wanted};
use crate::sys::{self, SharedMap};

/// How long what could not be tried is not tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a trial is repeated whose pages stay, or are moved by somebody else.
const ATTEMPTS: u32 = 4;

/// Whether the kernel understands the call, asked about nothing.
pub(super) fn understands(source: Source) -> bool {
    let Ok(pagemap) = File::open("/proc/self/pagemap") else { return false };
    let mut regions = [PageRegion::default(); 1];
    let asked = pagemap::scan(&pagemap, &(0..0), source, Wanted::AnyOf(PAGE_IS_SWAPPED), &mut regions);
    !matches!(asked, Err(Errno::NOTTY | Errno::INVAL))
}

/// Whether the kernel has the exact query and its answer is true. `None` when nothing can be paged out, which is tried again.
pub(super) fn exact_scan() -> Option<bool> {
    static TRIED: Mutex<(Option<bool>, Option<Instant>)> = Mutex::new((None, None));
    let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
    let (known, last) = &mut *tried;
    if known.is_none() && last.is_none_or(|last| last.elapsed() >= PAUSE) {
        *known = if understands(Source::File) { try_exact_scan() } else { Some(false) };
        *last = Some(Instant::now());
    }
    *known
}

/// Whether pages that are paged out leave markers; `None` when nothing can be paged out.
pub(super) fn markers() -> Option<bool> {
    let pages = Pages::to_page_out()?;
    let mapping = pages.mapping();
    let truth = pages.with_swapped()?;
    let hint = Marker.hint(&mapping, 0..Pages::COUNT).ok()?;
    let mut swapped = truth.ranges_of(PageState::Swapped).flatten();
    Some(swapped.any(|page| hint.get(page) == Some(PageState::Swapped)))
}

fn try_exact_scan() -> Option<bool> {
    let pages = Pages::to_page_out()?;
    let tables = pages.mapping().page_tables().ok()?;
    for _ in 0..ATTEMPTS {
        let truth = pages.with_swapped()?;
        let is_true = tells_the_truth(&Kernel, &tables, &truth);
        if pages.truth()? == truth {
            return Some(is_true);
        }
    }
    None
}

/// Whether a kernel's exact answers are `truth`, whatever it is asked to leave out.
fn tells_the_truth(kernel: &dyn Scan, tables: &PageTables, truth: &Residency) -> bool {
    [PageState::Hole, PageState::Resident, PageState::Swapped].iter().all(|most| {
        let answer = entries_from(kernel, tables, &(0..truth.len()), Source::File, *most);
        answer.is_ok_and(|answer| answer.build() == *truth)
    })
}

/// Pages in every state that page tables and page cache can be in: holes, never written and discarded; in memory, mapped
/// here or not; and on swap.
struct Pages {
    file: File,
    map: SharedMap,
}

impl Pages {
    const COUNT: u64 = 64;
    /// Written and mapped.
    const MAPPED: Range<u64> = 2..5;
    /// Written, and in no page table.
    const NOT_MAPPED: Range<u64> = 7..10;
    /// Written and mapped, and then discarded.
    const DISCARDED: Range<u64> = 10..12;
    /// Written, mapped and paged out; more than the kernel reads ahead.
    const PAGED_OUT: Range<u64> = 13..61;
    /// Those of them that are brought in again, and in no page table.
    const BROUGHT_IN: Range<u64> = 15..16;

    /// `None` when there cannot be any, or nothing could be paged out.
    fn to_page_out() -> Option<Self> {
        let has_room = swap::active().is_ok_and(|devices| devices.iter().any(|device| device.free_bytes() > 0));
        if has_room { Self::new() } else { None }
    }

    fn new() -> Option<Self> {
        let length = Self::COUNT * PAGE_SIZE;
        let file = memfd_create("memory-agent-trial", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).ok()?;
        let file = File::from(file);
        file.set_len(length).ok()?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).ok()?;
        let map = SharedMap::new(file.as_fd(), length as usize).ok()?;
        for pages in [Self::MAPPED, Self::NOT_MAPPED, Self::DISCARDED, Self::PAGED_OUT] {
            // Not zeros: those need no place in swap.
            let bytes = vec![0xa5; pages.byte_count() as usize];
            file.write_all_at(&bytes, pages.start * PAGE_SIZE).ok()?;
        }
        let pages = Self { file, map };
        for mapped in [Self::MAPPED, Self::DISCARDED, Self::PAGED_OUT] {
            pages.mapping().map_pages(&mapped).ok()?;
        }
        let (offset, length) = (Self::DISCARDED.start * PAGE_SIZE, Self::DISCARDED.byte_count());
        fallocate(&pages.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length).ok()?;
        pages.unmap()?;
        Some(pages)
    }

    /// Takes the pages out of the page table that are to be in none: the kernel maps neighbours together
    /// (mm/memory.c `do_fault_around`).
    fn unmap(&self) -> Option<()> {
        self.map.unmap(&self.mapping().in_file(&Self::NOT_MAPPED)).ok()?;
        self.map.unmap(&self.mapping().in_file(&Self::BROUGHT_IN)).ok()
    }

    fn mapping(&self) -> Mapping<'_> {
        Mapping::of_map(self.file.as_fd(), &self.map)
    }

    /// What they are now, by calls that every kernel has.
    fn truth(&self) -> Option<Residency> {
        PageCacheBySeek.residency(&self.mapping(), 0..Self::COUNT).ok()
    }

    /// What they are when some are on swap; `None` when nothing can be paged out.
    fn with_swapped(&self) -> Option<Residency> {
        for _ in 0..ATTEMPTS {
            let mapping = self.mapping();
            mapping.map_pages(&Self::PAGED_OUT).ok()?;
            // What was only just written may wait in a batch. Refused by some seccomp filters, and unknown without NUMA.
            let _ = sys::drain_lru_batches();
            mapping.advise_page_out(std::slice::from_ref(&Self::PAGED_OUT)).ok()?;
            if self.truth()?.counts().swapped > 0 {
                break;
            }
        }
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, Self::BROUGHT_IN.start * PAGE_SIZE).ok()?;
        self.unmap()?;
        self.truth().filter(|truth| truth.counts().swapped > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::sys::pagemap::{PAGE_IS_INCORE, PAGE_IS_PRESENT};

    /// A page as a kernel knows it: what it is, and whether it is mapped.
    type Page = (PageState, bool);

    /// A kernel that puts pages into categories in some way, and gives back what is asked for.
    struct Made<F> {
        pages: Vec<Page>,
        categories: F,
        /// Gives back the pages that are not in a category when asked for those, and not the others.
        inverts: bool,
    }

    impl<F: Fn(Page) -> u64> Scan for Made<F> {
        fn scan(
            &self,
            _: &PageTables,
            addresses: &Range<u64>,
            source: Source,
            wanted: Wanted,
            regions: &mut [PageRegion],
        ) -> rustix::io::Result<(usize, u64)> {
            assert_eq!(source, Source::File);
            let mut count = 0;
            for address in addresses.clone().step_by(PAGE_SIZE as usize) {
                let categories = (self.categories)(self.pages[(address / PAGE_SIZE) as usize]);
                let is_wanted = match wanted {
                    Wanted::AnyOf(any) => categories & any != 0,
                    Wanted::NotIn(category) => self.inverts == (categories & category == 0),
                };
                if is_wanted {
                    regions[count] = PageRegion { start: address, end: address + PAGE_SIZE, categories };
                    count += 1;
                }
            }
            Ok((count, addresses.end))
        }
    }

    const PAGES: [Page; 8] = [
        (PageState::Hole, false),
        (PageState::Resident, true),
        (PageState::Resident, false),
        (PageState::Swapped, false),
        (PageState::Swapped, false),
        (PageState::Hole, false),
        (PageState::Resident, true),
        (PageState::Hole, false),
    ];

    fn believed(categories: impl Fn(Page) -> u64, inverts: bool) -> bool {
        let mut truth = Residency::default();
        PAGES.iter().for_each(|(state, _)| truth.push(1, *state));
        let tables = PageTables { pagemap: Arc::new(tempfile::tempfile().unwrap()), address: 0 };
        tells_the_truth(&Made { pages: PAGES.to_vec(), categories, inverts }, &tables, &truth)
    }

    fn of_tables(mapped: bool) -> u64 {
        if mapped { PAGE_IS_PRESENT } else { 0 }
    }

    #[test]
    fn a_kernel_that_tells_the_truth_is_believed() {
        let exact = |(state, mapped): Page| {
            of_tables(mapped)
                | match state {
                    PageState::Hole => 0,
                    PageState::Resident => PAGE_IS_INCORE,
                    PageState::Swapped => PAGE_IS_SWAPPED,
                }
        };
        assert!(believed(exact, true));
        assert!(!believed(exact, false), "it answers another question when asked for what is not in a category");
    }

    #[test]
    fn a_kernel_that_means_something_else_is_not_believed() {
        // Takes the flag and looks at page tables alone.
        assert!(!believed(|(_, mapped)| of_tables(mapped), true));
        // The bit of pages in memory is that of pages that were accessed.
        assert!(!believed(|(_, mapped)| if mapped { PAGE_IS_PRESENT | PAGE_IS_INCORE } else { 0 }, true));
        let with_markers = |(state, mapped): Page| match state {
            PageState::Swapped => PAGE_IS_SWAPPED,
            _ if mapped => PAGE_IS_PRESENT | PAGE_IS_INCORE,
            _ => 0,
        };
        assert!(!believed(with_markers, true));
        // Every page is in memory, or none is swapped.
        assert!(!believed(|_| PAGE_IS_INCORE, true));
        assert!(!believed(|(state, _)| if state == PageState::Resident { PAGE_IS_INCORE } else { 0 }, true));
    }

    #[test]
    fn the_pages_of_a_trial_are_in_every_state() {
        let pages = Pages::new().unwrap();
        let truth = pages.truth().unwrap();
        let mapped = super::super::mapped(&pages.mapping(), &(0..Pages::COUNT)).unwrap();
        for (range, state, is_mapped) in [
            (0..2, PageState::Hole, false),
            (Pages::MAPPED, PageState::Resident, true),
            (Pages::NOT_MAPPED, PageState::Resident, false),
            (Pages::DISCARDED, PageState::Hole, false),
        ] {
            assert_eq!(truth.counts_in(range.clone()).of(state), range.page_count(), "{range:?}: {truth:?}");
            assert_eq!(mapped.counts_in(range.clone()).resident > 0, is_mapped, "{range:?}: {mapped:?}");
        }
        assert_eq!(truth.counts_in(Pages::PAGED_OUT).hole, 0);
    }
}
