//! Swap on a disk: pages are written and stay in the swap cache until the kernel wants their memory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod support;

use memory_agent::{
    ExactScan, MemoryGroup, PageCache, PageCacheBySeek, PageOutError, PageState, Probe, active, page_out,
};
use support::Memory;
use support::disk::DiskSwap;
use support::group::LimitedGroup;

const PAGES: u64 = 4096;

#[test]
fn what_waits_in_the_swap_cache_is_told_apart() {
    if !support::tells_swap_cache("what_waits_in_the_swap_cache_is_told_apart") {
        return;
    }
    let skipped = |why: String| {
        assert!(!support::must_run(), "swap on a loop device is needed: {why}");
        eprintln!("skipped what_waits_in_the_swap_cache_is_told_apart: {why}");
    };
    // Entered first: pages belong to the group that the process is in when it makes them.
    let group = match LimitedGroup::enter(1 << 30) {
        Ok(group) => group,
        Err(why) => return skipped(why),
    };
    let disk = match DiskSwap::new(64 << 20) {
        Ok(disk) => disk,
        Err(why) => return skipped(why),
    };
    let memory = Memory::new("disk", PAGES);
    (0..PAGES).for_each(|page| memory.write(page, page + 1));
    let mapping = memory.mapping();
    let report = page_out(&mapping, &[0..PAGES]).unwrap();
    assert_eq!(report.asked, PAGES);
    if MemoryGroup::own().is_some_and(|group| group.can_reclaim()) {
        assert!(report.swapped * 10 >= PAGES * 9, "memory.reclaim should have freed them: {report:?}");
    } else {
        assert!(report.queued > PAGES / 2, "a disk keeps what it is given: {report:?}");
        assert_eq!(report.swapped + report.left, PAGES, "{report:?}");
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
