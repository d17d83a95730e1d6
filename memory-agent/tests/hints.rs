//! Hints against the truth: whatever happens to memory, what a probe says of present pages and what is resolved of holes
//! is right, and how often it errs elsewhere is counted.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod support;

use std::thread;

use memory_agent::{
    ChosenProbe, Hint, HintProbe, KernelOffer, Marker, PageCache, PageState, Probe, ProbeChoice, ProbeError, ProbeKind,
    UffdMarker, page_out,
};
use support::hints::{Errors, check, probes};
use support::history::work;
use support::{Memory, Random, with_swap};

#[test]
fn errs_only_where_it_may_after_any_history() {
    with_swap("errs_only_where_it_may_after_any_history", || {
        const THREADS: u64 = 3;
        const PAGES: u64 = 3000;
        let memory = Memory::new("hints", THREADS * PAGES);
        let probes = probes(&memory);
        let mut errors: Vec<_> = probes.iter().map(|_| Errors::default()).collect();
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
            for (probe, errors) in probes.iter().zip(&mut errors) {
                let hint = probe.hint(&mapping, 0..memory.pages).unwrap();
                check(&hint, &truth, &mapping);
                errors.count(&truth, &hint);
                let part = probe.hint(&mapping, 100..memory.pages - 7).unwrap();
                assert_eq!(part.into_believed(), hint.into_believed().part(100..memory.pages - 7));
            }
            assert_eq!(PageCache.residency(&mapping, 0..memory.pages).unwrap(), truth, "with write protection on");
            assert_eq!(memory.truth(), truth, "asking has changed something");
            probes.iter().for_each(|probe| probe.arm().unwrap());
        }
        for (page, stamp) in stamps.iter().enumerate() {
            assert!(memory.pread_holds(page as u64, stamp.unwrap_or(0)), "content of page {page}");
        }
        for (probe, errors) in probes.iter().zip(&errors) {
            assert!(errors.swapped > 1000, "{errors:?}");
            errors.show(probe.name(), "any history");
        }
    });
}

/// One thing happens to swapped pages, all of them marked before.
fn scenario(name: &str, happens: impl Fn(&Memory)) {
    const PAGES: u64 = 4096;
    let memory = Memory::new("scenario", PAGES);
    (0..PAGES).for_each(|page| memory.write(page, page + 1));
    let probes = probes(&memory);
    page_out(&memory.mapping(), &[0..PAGES]).unwrap();
    happens(&memory);
    let (mapping, truth) = (memory.mapping(), memory.truth());
    for probe in &probes {
        let hint = probe.hint(&mapping, 0..PAGES).unwrap();
        check(&hint, &truth, &mapping);
        let mut errors = Errors::default();
        errors.count(&truth, &hint);
        errors.show(probe.name(), name);
    }
}

#[test]
fn what_makes_a_hint_wrong_is_known() {
    with_swap("what_makes_a_hint_wrong_is_known", || {
        scenario("paged out", |_| {});
        scenario("touched again", |memory| (0..1000).for_each(|page| assert!(memory.holds(page, page + 1))));
        scenario("brought in by pread", |memory| {
            (0..1000).for_each(|page| assert!(memory.pread_holds(page, page + 1)));
        });
        scenario("discarded", |memory| memory.punch(0, 1000));
        scenario("written and paged out again, not armed", |memory| {
            (0..1000).for_each(|page| memory.write(page, page + 2));
            page_out(&memory.mapping(), &[0..1000]).unwrap();
        });
    });
}

#[test]
fn markers_of_write_protection_are_seen() {
    with_swap("markers_of_write_protection_are_seen", || {
        if !KernelOffer::of_this_host().write_protect_async {
            eprintln!("skipped: {}", KernelOffer::of_this_host().why_not(ProbeKind::UffdMarker).unwrap());
            return;
        }
        let memory = Memory::new("armed", 1024);
        (0..512).for_each(|page| memory.write(page, page + 1));
        let probe = UffdMarker::new(&memory.mapping()).unwrap();
        page_out(&memory.mapping(), &[0..256]).unwrap();
        let mapping = memory.mapping();
        let hint = probe.hint(&mapping, 0..1024).unwrap();
        let truth = memory.truth();
        assert_eq!(hint.clone().into_believed(), truth, "nothing has happened that could mislead it");
        assert_eq!(hint.counts().swapped, 256);

        // Written since it was armed and paged out: open, and the exact probe finds it.
        memory.write(300, 9);
        page_out(&mapping, &[300..301]).unwrap();
        let hint = probe.hint(&mapping, 0..1024).unwrap();
        // A marker-patched kernel marks it all the same.
        let marked = KernelOffer::of_this_host().markers == Some(true);
        assert_eq!(hint.get(300), marked.then_some(PageState::Swapped));
        assert_eq!(hint.resolve(&mapping, &PageCache).unwrap().get(300), Some(PageState::Swapped));
        // Armed again, the next time it is seen.
        memory.write(300, 10);
        probe.arm().unwrap();
        page_out(&mapping, &[300..301]).unwrap();
        assert_eq!(probe.hint(&mapping, 300..301).unwrap().get(300), Some(PageState::Swapped));

        // Of other memory it knows nothing, and says so.
        let other = Memory::new("other", 16);
        (0..16).for_each(|page| other.write(page, 1));
        assert_eq!(probe.hint(&other.mapping(), 0..16).unwrap(), Hint::open(0..16));
        assert!(UffdMarker::new(&memory.mapping()).is_err(), "it is registered already");
    });
}

#[test]
fn any_choice_gives_the_same_map() {
    with_swap("any_choice_gives_the_same_map", || {
        let memory = Memory::new("choice", 2048);
        (0..1500).for_each(|page| memory.write(page, page + 1));
        let mapping = memory.mapping();
        let offer = KernelOffer::of_this_host();
        assert!(offer.markers.is_some(), "with swap it can be tried");
        let choices = ["auto", "page-cache", "exact-scan", "marker", "uffd-marker"]
            .map(|name| name.parse::<ProbeChoice>().unwrap());
        let mut chosen = Vec::new();
        for choice in choices {
            match (ChosenProbe::new(choice, &mapping), choice) {
                (Ok(probe), _) => chosen.push(probe),
                (Err(ProbeError::NotHere { probe, why }), ProbeChoice::Only(kind)) => {
                    assert_eq!((probe, Some(why)), (kind, offer.why_not(kind)));
                }
                (Err(e), _) => panic!("{choice}: {e}"),
            }
        }
        assert_eq!(chosen[0].name(), offer.best().0.name());
        page_out(&mapping, &[0..700]).unwrap();
        let truth = memory.truth();
        if offer.markers == Some(false) && !offer.write_protect_async {
            assert_eq!(Marker.hint(&mapping, 0..2048).unwrap().counts().swapped, 0);
        }
        for probe in &chosen {
            assert_eq!(probe.residency(&mapping, 0..2048).unwrap(), truth, "{}", probe.name());
        }
        assert!("swap-oracle".parse::<ProbeChoice>().is_err());
    });
}
