//! What the library says of real memory, against what the kernel says page by page.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod support;

use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use memory_agent::{
    Counts, ExactScan, FileView, Mapping, PAGE_SIZE, PageCache, PageCacheBySeek, PageState, Probe, ProbeError,
    Residency, ScanError, ScanGuard, ScanView, ScopedZram, SwapCounters, SwapKind, TargetError, active, counts_of,
    page_out, windows,
};
use rustix::fs::{SealFlags, fcntl_add_seals};
use rustix::io::pread;
use support::history::work;
use support::{Memory, Random, huge_pages, with_swap};

fn whole(probe: &dyn Probe, mapping: &Mapping<'_>) -> Residency {
    probe.residency(mapping, 0..mapping.pages()).unwrap()
}

/// Every eighth page stays a hole; three quarters of the rest, in pieces, are swapped. Page `n` has stamp `n + 1`.
fn three_quarters_cold(pages: u64) -> Memory {
    let memory = Memory::new("cold", pages);
    (0..pages).filter(|page| page % 8 != 7).for_each(|page| memory.write(page, page + 1));
    let cold: Vec<_> =
        (0..pages / 64).filter(|piece| piece % 4 != 3).map(|piece| piece * 64..piece * 64 + 64).collect();
    let report = page_out(&memory.mapping(), &cold).unwrap();
    assert_eq!(report.asked, pages / 64 / 4 * 3 * 56);
    assert!(report.left * 100 <= report.asked, "{report:?}");
    memory
}

#[test]
fn agrees_with_the_kernel_after_any_history() {
    with_swap("agrees_with_the_kernel_after_any_history", || {
        const THREADS: u64 = 3;
        const PAGES: u64 = 3000;
        let memory = Memory::new("history", THREADS * PAGES);
        let mut stamps = vec![None; (THREADS * PAGES) as usize];
        for round in 0..12 {
            thread::scope(|scope| {
                for (i, stamps) in stamps.chunks_mut(PAGES as usize).enumerate() {
                    let memory = &memory;
                    let mut random = Random(0x5eed + round * 16 + i as u64);
                    scope.spawn(move || work(memory, i as u64 * PAGES, stamps, &mut random));
                }
            });
            let mapping = memory.mapping();
            let truth = memory.truth();
            assert_eq!(whole(&PageCache, &mapping), truth, "round {round}");
            assert_eq!(whole(&PageCacheBySeek, &mapping), truth, "round {round}");
            // Where the kernel has no exact query the page cache answers.
            assert_eq!(whole(&ExactScan, &mapping), truth, "round {round}");
            for (page, stamp) in stamps.iter().enumerate() {
                let hole = truth.get(page as u64) == Some(PageState::Hole);
                // Pages that were only read can have become holes again: see the next test. A huge page takes holes along.
                let is_right = *stamp == Some(0) || hole == stamp.is_none() || !hole && huge_pages();
                assert!(is_right, "page {page} in round {round}");
            }
            let mut random = Random(round + 1);
            for probe in [&PageCache as &dyn Probe, &PageCacheBySeek, &ExactScan] {
                for _ in 0..20 {
                    let start = random.below(memory.pages);
                    let end = start + random.below(memory.pages - start + 1);
                    let part = probe.residency(&mapping, start..end).unwrap();
                    let runs = part.runs().map(|r| (r.pages, r.state));
                    assert!(runs.eq(truth.runs_in(start..end).map(|r| (r.pages, r.state))), "{start}..{end}");
                }
            }
            assert_eq!(memory.truth(), truth, "asking has changed something");
        }
        for (page, stamp) in stamps.iter().enumerate() {
            assert!(memory.pread_holds(page as u64, stamp.unwrap_or(0)), "content of page {page}");
        }
    });
}

#[test]
fn a_page_that_was_only_read_becomes_a_hole_again() {
    with_swap("a_page_that_was_only_read_becomes_a_hole_again", || {
        let memory = Memory::new("only-read", 64);
        let mapping = memory.mapping();
        (0..64).for_each(|page| assert!(memory.holds(page, 0)));
        assert_eq!(whole(&PageCache, &mapping), Residency::uniform(64, PageState::Resident));
        let report = page_out(&mapping, &[0..64]).unwrap();
        assert_eq!((report.asked, report.left), (64, 0));
        assert_eq!(whole(&PageCache, &mapping), Residency::uniform(64, PageState::Hole));
    });
}

#[test]
fn is_true_while_pages_change() {
    with_swap("is_true_while_pages_change", || {
        // Three regions: written once and never paged out; paged out and read in turn; untouched.
        const REGION: u64 = 4096;
        let memory = Memory::new("changing", 3 * REGION);
        (REGION..2 * REGION).for_each(|page| memory.write(page, page));
        (2 * REGION..3 * REGION).filter(|page| page % 3 != 0).for_each(|page| memory.write(page, page));
        let mapping = memory.mapping();
        page_out(&mapping, &[2 * REGION..3 * REGION]).unwrap();
        let untouched = PageCache.residency(&mapping, 2 * REGION..3 * REGION).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..4 {
                    (0..REGION).for_each(|page| memory.write(page, page + 1));
                    page_out(&mapping, &[REGION..2 * REGION]).unwrap();
                    (REGION..2 * REGION).for_each(|page| assert!(memory.holds(page, page)));
                    if round < 3 {
                        memory.punch(0, REGION);
                    }
                }
                done.store(true, Ordering::Release);
            });
            let prober = || {
                while !done.load(Ordering::Acquire) {
                    let found = whole(&PageCache, &mapping);
                    // Pages that are discarded as well could be anything for PageCacheBySeek, but not here.
                    assert_eq!(found.counts_in(0..REGION).swapped, 0);
                    assert_eq!(found.counts_in(REGION..2 * REGION).hole, 0);
                    // Swapped pages may be read ahead with their neighbours in swap, which are the other region's.
                    let found = found.part(2 * REGION..3 * REGION);
                    assert!(found.ranges_of(PageState::Hole).eq(untouched.ranges_of(PageState::Hole)));
                }
            };
            scope.spawn(prober);
            scope.spawn(prober);
        });
    });
}

#[test]
fn asking_changes_nothing() {
    with_swap("asking_changes_nothing", || {
        let memory = three_quarters_cold(32 << 10);
        let mapping = memory.mapping();
        let truth = memory.truth();
        let allocated = memory.allocated_pages();
        let view = FileView::open(format!("/proc/self/fd/{}", memory.file.as_raw_fd())).unwrap();
        for probe in [&PageCache as &dyn Probe, &PageCacheBySeek, &ExactScan] {
            for mapping in [mapping, view.mapping()] {
                // The counters are the host's: another process may swap at the same time, but not each time.
                let quiet = (0..10).any(|_| {
                    let before = SwapCounters::read().unwrap();
                    assert_eq!(whole(probe, &mapping), truth);
                    SwapCounters::read().unwrap().since(&before).swap_ins == 0
                });
                assert!(quiet, "{} swaps in", probe.name());
            }
        }
        assert_eq!(memory.truth(), truth);
        assert_eq!(memory.allocated_pages(), allocated);
    });
}

#[test]
fn scanning_leaves_memory_as_it_was() {
    with_swap("scanning_leaves_memory_as_it_was", || {
        const WINDOW: u64 = 2048;
        let memory = three_quarters_cold(16 << 10);
        let mapping = memory.mapping();
        let guard = ScanGuard::new(mapping);
        for by_mapping in [true, false] {
            let before = whole(&PageCache, &mapping);
            for window in windows(&before, PageState::Swapped, WINDOW) {
                let snapshot = guard.snapshot(&window).unwrap();
                assert!(snapshot.counts().swapped <= WINDOW);
                for page in window.iter().cloned().flatten() {
                    let right =
                        if by_mapping { memory.holds(page, page + 1) } else { memory.pread_holds(page, page + 1) };
                    assert!(right, "content of page {page}");
                }
                let peak = counts_of(&mapping).unwrap().resident;
                assert!(peak <= before.counts().resident + WINDOW + WINDOW / 100, "{peak} at a time");
                let report = snapshot.restore().unwrap();
                assert!(report.left * 100 <= report.asked, "{report:?}");
            }
            let after = whole(&PageCache, &mapping);
            let changed: u64 = before.ranges_where(&after, |a, b| a != b).map(|r| r.end - r.start).sum();
            assert!(changed * 100 <= before.counts().swapped, "{changed} pages changed");
            assert_eq!(after.counts().hole, before.counts().hole);
        }
    });
}

#[test]
fn what_comes_along_with_a_neighbour_goes_again() {
    with_swap("what_comes_along_with_a_neighbour_goes_again", || {
        if !support::tells_swap_cache("what_comes_along_with_a_neighbour_goes_again") {
            return;
        }
        let memory = three_quarters_cold(4096);
        let mapping = memory.mapping();
        let before = whole(&PageCache, &mapping);
        let wanted: Vec<_> = before.ranges_of(PageState::Swapped).flatten().step_by(8).collect();
        let guard = ScanGuard::new(mapping);
        wanted.iter().for_each(|&page| assert!(memory.pread_holds(page, page + 1)));
        // Where the kernel reads ahead from zram, the neighbours are in memory as well now, and nobody's.
        let snapshot = guard.snapshot(&[0..memory.pages]).unwrap();
        assert_eq!(snapshot.counts().swapped, before.counts().swapped - wanted.len() as u64);
        drop(snapshot);
        let after = whole(&PageCache, &mapping);
        let left = after.counts().resident - before.counts().resident - wanted.len() as u64;
        assert!(left * 100 <= before.counts().swapped, "{left} pages more in memory");
    });
}

#[test]
fn a_failing_reader_leaves_memory_as_it_was() {
    with_swap("a_failing_reader_leaves_memory_as_it_was", || {
        let memory = three_quarters_cold(4096);
        let mapping = memory.mapping();
        let before = whole(&PageCache, &mapping);
        let cold: Vec<_> = before.ranges_of(PageState::Swapped).collect();
        let failed = catch_unwind(AssertUnwindSafe(|| {
            let _snapshot = ScanGuard::new(mapping).snapshot(&cold).unwrap();
            cold.iter().cloned().flatten().for_each(|page| assert!(memory.holds(page, page + 1)));
            assert_eq!(counts_of(&mapping).unwrap().swapped, 0);
            std::panic::resume_unwind(Box::new("the reader fails"));
        }));
        assert!(failed.is_err());
        assert_eq!(whole(&PageCache, &mapping), before);
    });
}

#[test]
fn what_is_kept_stays() {
    with_swap("what_is_kept_stays", || {
        let memory = three_quarters_cold(4096);
        let mapping = memory.mapping();
        let mut snapshot = ScanGuard::new(mapping).snapshot(&[0..64, 64..192]).unwrap();
        assert_eq!(snapshot.counts(), Counts { hole: 24, resident: 0, swapped: 168 });
        assert_eq!(snapshot.runs().next().unwrap().pages, 0..7);
        (0..192).filter(|page| page % 8 != 7).for_each(|page| assert!(memory.holds(page, page + 1)));
        snapshot.keep(40..72);
        let report = snapshot.restore().unwrap();
        assert_eq!((report.asked, report.left), (168 - 28, 0));
        let after = PageCache.residency(&mapping, 0..192).unwrap();
        assert_eq!(after.counts_in(40..72).resident, 28);
        assert_eq!(after.counts().resident, 28);
    });
}

#[test]
fn pages_out_what_other_cpus_and_other_ways_brought_in() {
    with_swap("pages_out_what_other_cpus_and_other_ways_brought_in", || {
        let memory = three_quarters_cold(8192);
        let mapping = memory.mapping();
        let data = whole(&PageCache, &mapping).counts();
        for round in 0..6 {
            thread::scope(|scope| {
                for first in 0..4 {
                    let memory = &memory;
                    scope.spawn(move || {
                        for page in (first..memory.pages).step_by(4).filter(|page| page % 8 != 7) {
                            let right = if round % 2 == 0 {
                                memory.holds(page, page + 1)
                            } else {
                                memory.pread_holds(page, page + 1)
                            };
                            assert!(right, "content of page {page}");
                        }
                    });
                }
            });
            let report = page_out(&mapping, &[0..5000, 4000..memory.pages]).unwrap();
            assert_eq!(report.asked, data.resident + data.swapped);
            assert_eq!((report.left, report.swapped), (0, report.asked), "{report:?}");
            assert_eq!(whole(&PageCache, &mapping).counts().hole, data.hole);
        }
        assert_eq!(page_out(&mapping, &[0..memory.pages]).unwrap().asked, 0);
    });
}

#[test]
fn cheap_counts_are_the_same() {
    with_swap("cheap_counts_are_the_same", || {
        let memory = three_quarters_cold(8192);
        let mapping = memory.mapping();
        assert_eq!(counts_of(&mapping).unwrap(), whole(&PageCache, &mapping).counts());
        memory.punch(0, 100);
        assert_eq!(counts_of(&mapping).unwrap(), whole(&PageCache, &mapping).counts());
        let part = Mapping::new(mapping.fd(), 4096 * 64, mapping.address_of(64).unwrap(), 4096 * 128).unwrap();
        assert_eq!(counts_of(&part).unwrap(), whole(&PageCache, &part).counts());

        // Allocated but unwritten pages are holes that occupy memory.
        memory.fallocate(0, 50);
        assert_eq!(whole(&PageCache, &mapping).counts_in(0..100).hole, 100);
        assert_eq!(whole(&PageCacheBySeek, &mapping), whole(&PageCache, &mapping));
        assert_eq!(counts_of(&mapping).unwrap().hole, whole(&PageCache, &mapping).counts().hole - 50);
    });
}

#[test]
fn finds_the_largest_file_of_a_process() {
    let small = Memory::new("finds-the-largest", 4);
    let large = Memory::new("finds-the-largest", 16);
    large.write(3, 1);
    let view = FileView::of_process(std::process::id(), "finds-the-largest").unwrap();
    assert_eq!(view.mapping().pages(), large.pages);
    assert_eq!(whole(&PageCache, &view.mapping()), large.truth());
    assert_eq!(whole(&PageCache, &small.mapping()).counts().hole, 4);
    let none = FileView::of_process(std::process::id(), "no-such-name");
    assert!(matches!(none, Err(TargetError::NotFound { .. })), "{none:?}");
}

#[test]
fn refuses_what_is_not_whole_pages_of_shared_memory() {
    let memory = Memory::new("refuses", 4);
    let good = memory.mapping();
    let address = good.address_of(0).unwrap();
    let new = |offset, address, length| Mapping::new(good.fd(), offset, address, length).map(|m| m.pages());
    assert!(matches!(new(0, address, 4096 * 4), Ok(4)));
    assert!(matches!(new(0, address, 0), Err(TargetError::Unaligned { what: "length", .. })));
    assert!(matches!(new(1, address, 4096), Err(TargetError::Unaligned { what: "file offset", .. })));
    assert!(matches!(new(0, address + 8, 4096), Err(TargetError::Unaligned { what: "address", .. })));
    assert!(matches!(new(0, address, 4096 * 5), Err(TargetError::PastEnd { .. })));
    assert!(matches!(new(0, usize::MAX - 4095, 4096), Err(TargetError::Overflow { .. })));
    assert!(matches!(new(u64::MAX - 4095, address, 4096), Err(TargetError::Overflow { .. })));
    let program = std::fs::File::open("/proc/self/exe").unwrap();
    let other = Mapping::new(std::os::fd::AsFd::as_fd(&program), 0, address, 4096);
    assert!(matches!(other, Err(TargetError::NotSharedMemory)), "{other:?}");
    assert_eq!((good.address_of(4), good.file_offset_of(3)), (None, Some(3 * 4096)));
    assert!(matches!(PageCache.residency(&good, 2..5), Err(ProbeError::OutOfRange { .. })));
    assert!(page_out(&good, &[3..6]).is_err());
    assert_eq!(PageCache.residency(&good, 2..2).unwrap().len(), 0);
}

#[test]
fn zram_devices_are_not_shared() {
    with_swap("zram_devices_are_not_shared", || {
        let setups: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| ScopedZram::with_priority(16 << 20, 0))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
        });
        let devices = active().unwrap();
        let mut paths: Vec<_> = setups.iter().map(ScopedZram::path).collect();
        for path in &paths {
            let device = devices.iter().find(|device| &device.path == path).unwrap();
            assert_eq!((device.kind, device.priority, device.used_bytes), (SwapKind::Zram, 0, 0));
        }
        setups.into_iter().for_each(|zram| zram.close().unwrap());
        let left = active().unwrap();
        let ours = |path: &std::path::PathBuf| left.iter().any(|device| &device.path == path && device.priority == 0);
        assert!(!paths.iter().any(ours));
        paths.dedup();
        assert_eq!(paths.len(), 3);
    });
}

#[test]
fn what_the_owner_touches_during_a_scan_stays() {
    with_swap("what_the_owner_touches_during_a_scan_stays", || {
        const PAGES: u64 = 1024;
        let memory = three_quarters_cold(PAGES);
        let mapping = memory.mapping();
        assert!(matches!(ScanView::new(mapping.fd(), mapping.length()), Err(ScanError::NotSealed)));
        fcntl_add_seals(mapping.fd(), SealFlags::SHRINK).unwrap();
        let view = ScanView::new(mapping.fd(), mapping.length()).unwrap();
        let before = whole(&PageCache, &mapping);
        let cold: Vec<_> = before.ranges_of(PageState::Swapped).collect();
        let touched = cold[0].start;

        let snapshot = view.guard().snapshot(&cold).unwrap();
        let mut page = vec![0; PAGE_SIZE as usize];
        for number in cold.iter().cloned().flatten() {
            view.read(&(number..number + 1), &mut page).unwrap();
            let mut direct = vec![0; PAGE_SIZE as usize];
            pread(mapping.fd(), &mut direct, number * PAGE_SIZE).unwrap();
            assert!(page == direct, "content of page {number}");
        }
        assert!(memory.holds(touched, touched + 1));
        let report = snapshot.restore().unwrap();
        // A touch also maps resident neighbours (mm/memory.c, `do_fault_around`): up to 16 pages, aligned.
        let around = touched / 16 * 16..touched / 16 * 16 + 16;
        assert!((1..=16).contains(&report.left), "{report:?}");

        let after = whole(&PageCache, &mapping);
        assert_eq!(after.get(touched), Some(PageState::Resident));
        for run in before.ranges_where(&after, |before, after| before != after) {
            assert!(around.start <= run.start && run.end <= around.end, "{run:?} changed");
        }
        // The view has let go of them: their owner can page them out.
        assert_eq!(page_out(&mapping, &[around]).unwrap().left, 0);
        assert!(view.read(&(PAGES..PAGES + 1), &mut page).is_err());
    });
}
