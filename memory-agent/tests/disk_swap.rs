//! Swap on a disk: pages are written and stay in the swap cache until the kernel wants their memory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod support;

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use harness::host::skip;
use memory_agent::{
    ExactScan, MemoryGroup, PAGE_SIZE, PageCache, PageCacheBySeek, PageOutError, PageOutOptions, PageRanges, PageState,
    Probe, Target, active, page_out, page_out_with,
};
use support::Memory;
use support::disk::DiskSwap;
use support::group::LimitedGroup;

const PAGES: u64 = 4096;

/// Runs a test in a control group of its own and with swap on a disk, or says why it is skipped.
fn with_disk_swap(test: &str, body: impl Fn(&LimitedGroup, &DiskSwap)) {
    static ALONE: Mutex<()> = Mutex::new(());
    if !support::tells_swap_cache(test) {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // Entered first: pages belong to the group that the process is in when it makes them.
    let set_up = LimitedGroup::enter(1 << 30).and_then(|group| Ok((DiskSwap::new(64 << 20)?, group)));
    match set_up {
        Ok((disk, group)) => support::undisturbed(test, Path::new(disk.device()), || body(&group, &disk)),
        Err(why) => skip(test, why),
    }
}

/// Written and paged out, and the memory wanted for a moment: what waited in the swap cache has gone.
fn all_swapped(group: &LimitedGroup, name: &str) -> Memory {
    let memory = Memory::new(name, PAGES);
    (0..PAGES).for_each(|page| memory.write(page, page + 1));
    page_out(&memory.mapping(), &[0..PAGES]).unwrap();
    group.limit(PAGES * PAGE_SIZE / 8).unwrap();
    group.limit(1 << 30).unwrap();
    memory
}

#[test]
fn what_was_read_ahead_is_left_where_it_is() {
    with_disk_swap("what_was_read_ahead_is_left_where_it_is", |group, _| {
        let memory = all_swapped(group, "read-ahead");
        let (mapping, view) = (memory.mapping(), memory.mapping().view().unwrap());
        let before = PageCache.residency(&mapping, 0..PAGES).unwrap();
        // In short runs, at whose ends there is something that was read ahead.
        let is_read = |page: u64| page % 64 < 16;
        let read = (0..PAGES).filter(|page| is_read(*page));
        read.for_each(|page| assert!(memory.pread_holds(page, page + 1), "content of page {page}"));
        let after = PageCache.residency(&mapping, 0..PAGES).unwrap();
        let came = before.ranges_where(&after, |a, b| a == PageState::Swapped && b == PageState::Resident).flatten();
        let ahead: PageRanges = came.filter(|page| !is_read(*page)).map(|page| page..page + 1).collect();
        assert!(ahead.page_count() > PAGES / 64, "{} pages were read ahead", ahead.page_count());

        // Whoever pages out, by whichever way, leaves them to the kernel: an agent, a guard and a scan come this way. Some may
        // leave memory by themselves.
        let in_file: Vec<_> = ahead.iter().map(|range| mapping.in_file(range)).collect();
        for report in [view.page_out(&in_file).unwrap(), page_out(&mapping, &ahead).unwrap()] {
            assert!(report.asked > ahead.page_count() / 2, "{report:?}");
            assert_eq!((report.queued, report.attempts), (report.asked, 0), "they were written again: {report:?}");
        }
    });
}

#[test]
fn what_waits_in_the_swap_cache_is_told_apart() {
    with_disk_swap("what_waits_in_the_swap_cache_is_told_apart", tells_the_swap_cache_apart);
}

fn tells_the_swap_cache_apart(group: &LimitedGroup, disk: &DiskSwap) {
    let memory = Memory::new("disk", PAGES);
    (0..PAGES).for_each(|page| memory.write(page, page + 1));
    let mapping = memory.mapping();
    let report = page_out(&mapping, &[0..PAGES]).unwrap();
    assert_eq!(report.asked, PAGES);
    assert!(report.queued > PAGES / 2, "a disk keeps what it is given: {report:?}");
    assert_eq!(report.swapped + report.left, PAGES, "{report:?}");
    // Nobody's group is asked for anything without consent.
    let mut options = PageOutOptions::default();
    options.reclaim_group = true;
    let report = page_out_with(&mapping, &[0..PAGES], options).unwrap();
    if MemoryGroup::own().is_some_and(|group| group.can_reclaim()) {
        assert!(report.left * 10 <= PAGES, "memory.reclaim should have freed them: {report:?}");
    } else {
        assert_eq!(report.swapped + report.left, report.asked, "{report:?}");
    }
    // They are in memory, and the probes say so.
    let ask = |probe: &dyn Probe| probe.residency(&mapping, 0..PAGES).unwrap();
    let (truth, answers) = memory.at_rest(|| [ask(&PageCache), ask(&PageCacheBySeek), ask(&ExactScan)]);
    assert!(answers.iter().all(|answer| *answer == truth), "{answers:?} and {truth:?}");
    assert_eq!(truth.counts().hole, 0);

    // When the memory is wanted they go without being written again.
    group.limit(PAGES * 4096 / 4).unwrap();
    group.limit(1 << 30).unwrap();
    let (truth, answer) = memory.at_rest(|| ask(&PageCache));
    assert!(truth.counts().swapped > PAGES / 2, "{truth:?}");
    assert_eq!(answer, truth);
    let device = active().unwrap().into_iter().find(|device| device.path.to_str() == Some(disk.device())).unwrap();
    assert!(device.used_bytes >= truth.counts().swapped * 4096, "{device:?}");
    (0..PAGES).for_each(|page| assert!(memory.pread_holds(page, page + 1), "content of page {page}"));

    // Full: what fits goes, the rest stays and is told.
    drop(memory);
    let larger = Memory::new("disk-full", PAGES * 5);
    (0..PAGES * 5).for_each(|page| larger.write(page, page + 1));
    match page_out(&larger.mapping(), &[0..PAGES * 5]) {
        Ok(report) => assert!(report.left > 0 && report.asked == PAGES * 5, "{report:?}"),
        Err(e) => assert!(matches!(e, PageOutError::SwapFull(_) | PageOutError::Kept(_)), "{e}"),
    }
    let (truth, answer) = larger.at_rest(|| PageCache.residency(&larger.mapping(), 0..PAGES * 5).unwrap());
    assert_eq!(answer, truth);
    (0..PAGES * 5).for_each(|page| assert!(larger.pread_holds(page, page + 1), "content of page {page}"));
    assert_eq!(larger.truth().counts_in(0..1).total(), 1);
    assert_ne!(larger.truth().get(0), Some(PageState::Hole));
}
