//! Swap on a disk: pages are written and stay in the swap cache until the kernel wants their memory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod support;

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use harness::host::skip;
use memory_agent::{
    Agent, AgentOptions, ExactScan, MemoryGroup, PAGE_SIZE, PageCache, PageCacheBySeek, PageOutError, PageOutOptions,
    PageState, Probe, ResidencyGuard, Target, active, page_out, page_out_with,
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
fn an_agent_leaves_what_was_read_ahead_where_it_is() {
    with_disk_swap("an_agent_leaves_what_was_read_ahead_where_it_is", |group, disk| {
        const READ: u64 = 200;
        const TIME: Duration = Duration::from_secs(15);
        let memory = all_swapped(group, "read-ahead");
        let mapping = memory.mapping();
        let options = AgentOptions { budget: 100.0, interval: Duration::from_millis(5), ..AgentOptions::default() };
        let agent = Agent::new(options).unwrap();
        thread::scope(|scope| {
            let watching = scope.spawn(|| agent.watch(&[&mapping]));
            assert!(agent.wait_for_rounds(1, Duration::from_secs(20)));
            let before = disk.pages_written();
            // In order, so that the kernel reads ahead, and with a look between any two. An agent runs when nobody else wants
            // the CPU: on a busy host fewer pages have to do.
            let started = Instant::now();
            let mut read = 0;
            while read < READ && started.elapsed() < TIME {
                assert!(memory.holds(read, read + 1), "content of page {read}");
                let rounds = agent.cost().rounds;
                agent.wait_for_rounds(rounds + 2, TIME);
                read += 1;
            }
            agent.stop();
            let cost = agent.cost();
            let written = disk.pages_written() - before;
            watching.join().unwrap().unwrap();
            assert!(cost.swapped_in >= read / 2, "nothing was read: {cost:?}");
            assert!(written <= read / 20, "{written} pages were written out again, {read} were read: {cost:?}");
        });
    });
}

#[test]
fn a_guard_and_a_reader_leave_what_was_read_ahead_where_it_is() {
    with_disk_swap("a_guard_and_a_reader_leave_what_was_read_ahead_where_it_is", |group, disk| {
        let memory = all_swapped(group, "read-ahead-guarded");
        let (mapping, view) = (memory.mapping(), memory.mapping().view().unwrap());
        let mut guard = ResidencyGuard::new(&mapping, 512).unwrap();
        let before = disk.pages_written();
        // In short runs, at whose ends there is something that was read ahead.
        let resident = || PageCache.residency(&mapping, 0..PAGES).unwrap().counts().resident;
        let resident_before = resident();
        let read: Vec<_> = (0..PAGES).filter(|page| page % 64 < 16).collect();
        read.iter().for_each(|&page| assert!(memory.pread_holds(page, page + 1), "content of page {page}"));
        let read = read.len() as u64;
        let ahead = resident() - resident_before - read;
        assert!(ahead > PAGES / 64, "{ahead} pages were read ahead, and {read} read");
        guard.step().unwrap();
        guard.step().unwrap();
        guard.finish().unwrap();
        view.page_out(&[0..PAGES]).unwrap();
        // What was read is on its way, and nothing else is written.
        let written = disk.pages_written() - before;
        assert!(written <= read + ahead / 8, "{written} pages were written: {read} were read, {ahead} read ahead");
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
