//! Residency under memory pressure: what is cold is decided by the kernel's reclaim and not by us.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]

mod support;

use std::thread;

use harness::host::skip;
use memory_agent::{ExactScan, PAGE_SIZE, PageCache, PageCacheBySeek, Probe};
use support::group::LimitedGroup;
use support::hints::{Errors, check, probes};
use support::history::work;
use support::{Memory, Random, with_swap};

const THREADS: u64 = 3;
const PAGES: u64 = 6000;
/// A third of the memory fits.
const LIMIT: u64 = THREADS * PAGES * PAGE_SIZE / 3;

#[test]
fn agrees_with_the_kernel_after_reclaim() {
    with_swap("agrees_with_the_kernel_after_reclaim", || {
        let group = match LimitedGroup::enter(LIMIT) {
            Ok(group) => group,
            Err(why) => return skip("agrees_with_the_kernel_after_reclaim", why),
        };
        let memory = Memory::new("pressure", THREADS * PAGES);
        let probes = probes(&memory);
        let mut errors: Vec<_> = probes.iter().map(|_| Errors::default()).collect();
        let mut stamps = vec![None; (THREADS * PAGES) as usize];
        for (page, stamp) in (0..).zip(&mut stamps) {
            memory.write(page, page + 1);
            *stamp = Some(page + 1);
        }
        for round in 0..6 {
            group.limit(LIMIT).unwrap();
            thread::scope(|scope| {
                for (i, stamps) in stamps.chunks_mut(PAGES as usize).enumerate() {
                    let memory = &memory;
                    let mut random = Random(0xc01d + round * 16 + i as u64);
                    scope.spawn(move || work(memory, i as u64 * PAGES, stamps, &mut random));
                }
            });
            // With room to spare the kernel leaves everything where it is.
            group.limit(8 * LIMIT).unwrap();
            let (mapping, truth) = (memory.mapping(), memory.truth());
            assert!(truth.counts().swapped > PAGES, "no pressure: {:?}", truth.counts());
            for probe in [&PageCache as &dyn Probe, &PageCacheBySeek, &ExactScan] {
                assert_eq!(probe.residency(&mapping, 0..memory.pages).unwrap(), truth, "{}", probe.name());
            }
            for (probe, errors) in probes.iter().zip(&mut errors) {
                let hint = probe.hint(&mapping, 0..memory.pages).unwrap();
                check(&hint, &truth, &mapping);
                errors.count(&truth, &hint);
            }
            probes.iter().for_each(|probe| probe.arm().unwrap());
            assert_eq!(memory.truth(), truth, "asking has changed something");
        }
        for (page, stamp) in stamps.iter().enumerate() {
            assert!(memory.pread_holds(page as u64, stamp.unwrap_or(0)), "content of page {page}");
        }
        probes.iter().zip(&errors).for_each(|(probe, errors)| errors.show(probe.name(), "memory pressure"));
    });
}
