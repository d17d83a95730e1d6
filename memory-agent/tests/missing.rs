//! Pages that are filled in later: whoever touches one waits, and sees nothing but what was filled in.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use harness::host::skip;
use memory_agent::{MissingFaults, PageCache, Probe, page_out};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use support::{Memory, page_with, with_swap};

fn faults() -> Option<MissingFaults> {
    match MissingFaults::open() {
        Ok(faults) => Some(faults),
        Err(e) => {
            skip("what needs faults on missing pages", e);
            None
        }
    }
}

#[test]
fn who_touches_a_hole_waits_until_it_is_filled() {
    let Some(faults) = faults() else { return };
    let memory = Memory::new("missing", 64);
    memory.write(8, 8);
    let mapping = faults.register(&memory.mapping()).unwrap();
    let view = faults.landing_view(&memory.mapping()).unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let seen = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Of three pages two hold their number, the third is zeros.
            for page in 0..64 {
                assert!(memory.holds(page, if page % 3 != 2 || page == 8 { page } else { 0 }), "page {page}");
            }
            rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
        });
        let mut pages = Vec::new();
        loop {
            let mut fds = [PollFd::new(&faults, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
            poll(&mut fds, None).unwrap();
            if !fds[1].revents().is_empty() {
                break;
            }
            faults.read(|address| pages.push(mapping.page_of(address).unwrap())).unwrap();
            for page in pages.drain(..) {
                seen.fetch_add(1, Ordering::Relaxed);
                assert_ne!(page, 8, "it was there");
                // Long enough that whoever did not wait would have gone on.
                thread::sleep(Duration::from_millis(1));
                match page % 3 {
                    0 => {
                        faults.land(&view, &(page..page + 1), &page_with(page)).unwrap();
                        faults.wake(&mapping, &(page..page + 1)).unwrap();
                    }
                    1 => faults.fill(&mapping, &(page..page + 1), &page_with(page)).unwrap(),
                    _ => faults.zero(&mapping, page).unwrap(),
                }
            }
        }
    });
    assert!(seen.into_inner() >= 63);
    // What is there stays, whoever says otherwise.
    faults.zero(&mapping, 8).unwrap();
    faults.fill(&mapping, &(8..9), &[1; 4096]).unwrap();
    faults.land(&view, &(8..9), &[1; 4096]).unwrap();
    assert!(memory.holds(8, 8));
    assert_eq!(faults.fill(&mapping, &(64..65), &[1; 4096]).unwrap_err().filled, 0);
    assert_eq!(faults.land(&view, &(64..65), &[1; 4096]).unwrap_err().filled, 0);
    faults.wake(&mapping, &(63..65)).unwrap_err();
    faults.zero(&mapping, u64::MAX).unwrap_err();
    faults.unregister(&mapping).unwrap();
    memory.punch(20, 1);
    assert!(memory.holds(20, 0));
}

#[test]
fn a_swapped_page_is_not_missing() {
    with_swap("a_swapped_page_is_not_missing", || {
        let Some(faults) = faults() else { return };
        let memory = Memory::new("missing-swapped", 64);
        let mapping = memory.mapping();
        (0..64).for_each(|page| memory.write(page, page + 1));
        faults.register(&mapping).unwrap();
        assert_eq!(page_out(&mapping, &[0..64]).unwrap().left, 0);
        let states = PageCache.residency(&mapping, 0..64).unwrap();
        assert_eq!(states.counts().swapped, 64);
        // Nobody handles faults: this would wait for ever.
        (0..64).for_each(|page| assert!(memory.holds(page, page + 1)));
    });
}

/// Pages that are there already stay what they are, wherever in a run they are, and the others are filled.
#[test]
fn a_run_is_filled_around_what_is_there() {
    let Some(faults) = faults() else { return };
    let memory = Memory::new("missing-run", 64);
    let there = [0, 5, 6, 15, 40];
    there.iter().for_each(|page| memory.write(*page, 100 + page));
    let mapping = faults.register(&memory.mapping()).unwrap();
    let view = faults.landing_view(&memory.mapping()).unwrap();
    let bytes: Vec<u8> = (0..16).flat_map(page_with).collect();
    faults.land(&view, &(0..16), &bytes).unwrap();
    let bytes: Vec<u8> = (32..48).flat_map(page_with).collect();
    faults.fill(&mapping, &(32..48), &bytes).unwrap();
    for page in (0..16).chain(32..48) {
        assert!(memory.holds(page, if there.contains(&page) { 100 + page } else { page }), "page {page}");
    }
    assert_eq!(PageCache.residency(&memory.mapping(), 0..64).unwrap().counts().resident, 32);
}

/// Where a write through the file adds neighbours, a page that lands does not. In the lab, under each setting of the host's:
/// `MEMORY_AGENT_TESTS_SHMEM_ENABLED` names the one that is to be in force.
#[test]
fn a_page_lands_alone_whatever_the_huge_page_setting() {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    /// Two huge pages' worth.
    const PAGES: u64 = 1024;
    let Some(faults) = faults() else { return };
    let in_force = std::fs::read_to_string(SETTING).unwrap_or_default();
    let must = std::env::var("MEMORY_AGENT_TESTS_SHMEM_ENABLED").ok();
    if let Some(must) = &must {
        assert!(in_force.contains(&format!("[{must}]")), "{must} is not in force: {in_force}");
    }
    let written = Memory::new("missing-written", PAGES);
    written.pwrite(600, 600);
    let beside = PageCache.residency(&written.mapping(), 0..PAGES).unwrap().counts().resident - 1;
    if ["always", "within_size", "force"].iter().any(|setting| in_force.contains(&format!("[{setting}]"))) {
        assert!(beside > 0, "the setting has no effect here, and this trial proves nothing");
    }
    let memory = Memory::new("missing-alone", PAGES);
    let mapping = faults.register(&memory.mapping()).unwrap();
    let view = faults.landing_view(&memory.mapping()).unwrap();
    faults.land(&view, &(600..602), &[page_with(600), page_with(601)].concat()).unwrap();
    faults.fill(&mapping, &(100..101), &page_with(100)).unwrap();
    faults.zero(&mapping, 101).unwrap();
    let resident: Vec<_> = PageCache
        .residency(&memory.mapping(), 0..PAGES)
        .unwrap()
        .ranges_of(memory_agent::PageState::Resident)
        .collect();
    assert_eq!(resident, [100..102, 600..602], "with {in_force}, where a write adds {beside} pages");
}
