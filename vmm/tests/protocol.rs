//! The whole migration protocol between two machines without KVM: the guest is a thread that writes its memory, the
//! dirty log is the monitor's own, the connection is a socket pair with somebody in the middle.
//!
//! Nothing here depends on swap: what is cold is another test's concern.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use memory_agent::{Hint, PageState, Residency};
use proptest::prelude::*;
use thermocline::migration::cancel::Cancel;
use thermocline::migration::destination::DestinationError;
use thermocline::migration::link::{Address, Link, Listener};
use thermocline::migration::plan::ColdPolicy;
use thermocline::migration::progress::{PagesByClass, Phase, Progress, Report};
use thermocline::migration::source::{self, Options, SourceError};
use thermocline::migration::{Belief, SourceMachine};

use support::{Fake, PAGES, receive};

/// How many bytes somebody in the middle lets through each way before the connection breaks.
#[derive(Clone, Copy, Debug)]
struct Limits {
    to_destination: u64,
    to_source: u64,
}

const UNBROKEN: Limits = Limits { to_destination: u64::MAX, to_source: u64::MAX };

/// What became of a migration.
struct Moved {
    source: Arc<Fake>,
    source_result: Result<Report, SourceError>,
    destination: Arc<Fake>,
    destination_result: Result<(), DestinationError>,
    /// Bytes that went through each way.
    passed: Limits,
}

/// Copies until `limit` bytes have passed or one side ends, then ends both.
fn copy(mut from: UnixStream, mut to: UnixStream, limit: u64, passed: &AtomicU64) {
    let mut buffer = vec![0; 1 << 16];
    let mut left = limit;
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match from.read(&mut buffer[..most]) {
            Ok(n @ 1..) if to.write_all(&buffer[..n]).is_ok() => {
                left -= n as u64;
                passed.fetch_add(n as u64, Ordering::SeqCst);
            }
            _ => break,
        }
    }
    let how = if left == 0 { Shutdown::Both } else { Shutdown::Write };
    let _ = to.shutdown(how);
    if left == 0 {
        let _ = from.shutdown(Shutdown::Both);
    }
}

/// Migrates a fake machine prepared by `prepare` while `guest` runs in it.
fn migrate(
    limits: Limits,
    cold: ColdPolicy,
    prepare: impl FnOnce(&Fake),
    guest: impl Fn(&Fake) + Send + 'static,
) -> Moved {
    let source = Arc::new(Fake::new());
    SourceMachine::resume(source.as_ref());
    prepare(&source);
    let ended = Arc::new(AtomicBool::new(false));
    let guest = thread::spawn({
        let (source, ended) = (Arc::clone(&source), Arc::clone(&ended));
        move || {
            while !ended.load(Ordering::SeqCst) {
                guest(&source);
            }
        }
    });

    let (ours, middle_source) = UnixStream::pair().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("destination");
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    let destination = Arc::new(Fake::new());
    let made = Arc::clone(&destination);
    let receiving = receive(listener, true, move |_| Ok(Arc::clone(&made)));
    let middle_destination = UnixStream::connect(path).unwrap();
    let counts = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let middle = [
        thread::spawn({
            let (from, to) = (middle_source.try_clone().unwrap(), middle_destination.try_clone().unwrap());
            let counts = Arc::clone(&counts);
            move || copy(from, to, limits.to_destination, &counts.0)
        }),
        thread::spawn({
            let counts = Arc::clone(&counts);
            move || copy(middle_destination, middle_source, limits.to_source, &counts.1)
        }),
    ];
    let options = Options { cold, ..Options::default() };
    let source_result = source::migrate(
        source.as_ref(),
        Link::try_from(ours).unwrap(),
        &options,
        None,
        &Cancel::default(),
        &mut |_: &Progress| {},
    );
    let destination_result = receiving.arrives();
    ended.store(true, Ordering::SeqCst);
    guest.join().unwrap();
    for thread in middle {
        thread.join().unwrap();
    }
    let passed = Limits { to_destination: counts.0.load(Ordering::SeqCst), to_source: counts.1.load(Ordering::SeqCst) };
    Moved { source, source_result, destination, destination_result, passed }
}

fn busy_guest() -> impl Fn(&Fake) + Send + 'static {
    let at = AtomicU64::new(0);
    move |fake| {
        let n = at.fetch_add(1, Ordering::Relaxed);
        // Over and over the same few pages, now and then one that was a hole or becomes empty.
        let page = if n.is_multiple_of(7) { n * 31 % PAGES } else { n % 16 };
        fake.execute(page, (n % 5) as u8);
        thread::sleep(Duration::from_micros(20));
    }
}

fn half_full(fake: &Fake) {
    for page in 0..PAGES / 2 {
        fake.write(page * 2, page as u8);
    }
}

#[test]
fn memory_arrives_whole_while_the_guest_writes() {
    for cold in [ColdPolicy::Paced, ColdPolicy::Eager] {
        let outcome = migrate(UNBROKEN, cold, half_full, busy_guest());
        let report = outcome.source_result.unwrap();
        outcome.destination_result.unwrap();
        let destination = outcome.destination;
        // The source is paused since switchover, the destination's guest does nothing: both are the same.
        assert!(outcome.source.content() == destination.content(), "memory differs");
        assert!(!outcome.source.runs() && destination.runs());
        let state = destination.state.lock().unwrap().clone().unwrap();
        assert_eq!(state.records, outcome.source.save().unwrap().records);
        let pages = report.pages;
        assert_eq!(pages.hole + pages.zero + pages.hot + pages.cold, PAGES, "{pages:?}");
    }
}

#[test]
fn a_guest_that_stands_goes_on_standing() {
    let outcome = migrate(
        UNBROKEN,
        ColdPolicy::Paced,
        |source| SourceMachine::pause(source).unwrap(),
        |_| thread::sleep(Duration::from_millis(1)),
    );
    assert!(outcome.source_result.is_ok() && outcome.destination_result.is_ok());
    assert!(!outcome.source.runs() && !outcome.destination.runs());
}

#[test]
fn holes_stay_holes_on_both_sides() {
    let outcome = migrate(UNBROKEN, ColdPolicy::Paced, half_full, |_| thread::sleep(Duration::from_millis(1)));
    assert!(outcome.source_result.is_ok());
    assert_eq!(outcome.source.ram.counts().unwrap().hole, PAGES / 2);
    // Page 0 and every page whose number's low byte is 0 were written with zeros: they travel as such and stay holes.
    let empty = (0..PAGES / 2).filter(|page| *page as u8 == 0).count() as u64;
    assert_eq!(outcome.destination.ram.counts().unwrap().hole, PAGES / 2 + empty);
}

/// Wherever the connection breaks: exactly one side runs the guest, or the source says that it cannot know.
fn check_one_owner(limits: Limits) {
    let outcome = migrate(limits, ColdPolicy::Paced, half_full, busy_guest());
    let runs = (outcome.source.runs(), outcome.destination.runs());
    let expected = match (&outcome.source_result, &outcome.destination_result) {
        (Ok(_) | Err(SourceError::Unconfirmed(_)), Ok(())) => {
            assert!(outcome.source.content() == outcome.destination.content(), "{limits:?}: memory differs");
            (false, true)
        }
        (Err(SourceError::Unconfirmed(_)), Err(_)) => (false, false),
        (Err(_), Err(_)) => (true, false),
        (source, destination) => panic!("{limits:?}: source {source:?}, destination {destination:?}"),
    };
    assert_eq!(runs, expected, "{limits:?}: {:?}, {:?}", outcome.source_result, outcome.destination_result);
}

#[test]
fn a_connection_may_break_after_any_byte() {
    let whole = migrate(UNBROKEN, ColdPolicy::Paced, half_full, |_| thread::sleep(Duration::from_millis(1)));
    assert!(whole.source_result.is_ok());
    // The end decides over the owner: every byte of it, and a sample of what comes before.
    let total = whole.passed.to_destination;
    for to_destination in (0..total.saturating_sub(600)).step_by(total as usize / 40).chain(total - 600..=total + 600) {
        if to_destination.is_multiple_of(23) || to_destination > total - 60 {
            check_one_owner(Limits { to_destination, ..UNBROKEN });
        }
    }
    for to_source in (0..=whole.passed.to_source).step_by(3) {
        check_one_owner(Limits { to_source, ..UNBROKEN });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is in memory and whatever the guest writes meanwhile.
    #[test]
    fn any_memory_arrives(
        content in prop::collection::vec((0..PAGES, 0u8..4), 0..200),
        writes in prop::collection::vec((0..PAGES, 0u8..4), 1..200),
        eager: bool,
    ) {
        let cold = if eager { ColdPolicy::Eager } else { ColdPolicy::Paced };
        let at = AtomicU64::new(0);
        let outcome = migrate(
            UNBROKEN,
            cold,
            |fake| content.iter().for_each(|(page, value)| fake.write(*page, *value)),
            move |fake| {
                let (page, value) = writes[at.fetch_add(1, Ordering::Relaxed) as usize % writes.len()];
                fake.execute(page, value);
            },
        );
        prop_assert!(outcome.source_result.is_ok(), "{:?}", outcome.source_result);
        prop_assert!(outcome.source.content() == outcome.destination.content());
    }

    /// A probe that lies: it calls pages holes, resident or swapped by chance, or knows of other memory. What it says is a
    /// hint, and the memory arrives all the same.
    #[test]
    fn memory_arrives_whatever_a_probe_says(
        content in prop::collection::vec((0..PAGES, 0u8..4), 0..200),
        lies in prop::collection::vec((1..60u64, 0..3usize), 0..80),
        writes in prop::collection::vec((0..PAGES, 0u8..4), 1..50),
        eager: bool,
    ) {
        let states = [PageState::Hole, PageState::Resident, PageState::Swapped];
        let mut lie = Residency::default();
        for (pages, state) in lies {
            lie.push(pages.min(PAGES - lie.len()), states[state]);
        }
        // Mostly of the right length, so that it is listened to.
        if lie.len() > PAGES / 4 {
            lie.push(PAGES - lie.len(), PageState::Hole);
        }
        let cold = if eager { ColdPolicy::Eager } else { ColdPolicy::Paced };
        let at = AtomicU64::new(0);
        let outcome = migrate(
            UNBROKEN,
            cold,
            |fake| {
                content.iter().for_each(|(page, value)| fake.write(*page, *value));
                *fake.believed.lock().unwrap() = Some(Belief { hint: Hint::of(lie.clone()), probe: "liar" });
            },
            move |fake| {
                let (page, value) = writes[at.fetch_add(1, Ordering::Relaxed) as usize % writes.len()];
                fake.execute(page, value);
            },
        );
        let report = outcome.source_result.unwrap();
        prop_assert_eq!(report.classed_by == "liar", lie.len() == PAGES, "{}", report.classed_by);
        prop_assert!(outcome.source.content() == outcome.destination.content(), "with {lie:?}");
        let pages = report.pages;
        prop_assert_eq!(pages.hole + pages.zero + pages.hot + pages.cold, PAGES, "{:?}", pages);
    }
}

/// Holes, pages with nothing in them and all others are delivered once; what the guest writes behind that is sent again, whatever
/// it was and whatever it is then.
#[test]
fn what_the_guest_has_written_is_counted_as_sent_again_and_nothing_else() {
    const EMPTY: u64 = 7;
    let source = Fake::new();
    SourceMachine::resume(&source);
    // Runs of holes beside pages with nothing in them, so that one batch has both.
    (0..PAGES).filter(|page| page % 4 != 3).for_each(|page| source.write(page, (page % EMPTY) as u8));
    let holes = PAGES / 4;
    let empty = (0..PAGES).filter(|page| page % 4 != 3 && page % EMPTY == 0).count() as u64;
    let has_written = std::cell::Cell::new(false);
    let mut guest = |progress: &Progress| {
        if progress.phase == Phase::Cold && !has_written.replace(true) {
            // What was a hole, was empty, was neither; what is empty now.
            [(3, 1), (103, 1), (EMPTY, 2), (4, 2), (5, 2), (6, 0), (8, 0)]
                .into_iter()
                .for_each(|(page, value)| assert!(source.execute(page, value)));
        }
    };
    let directory = tempfile::tempdir().unwrap();
    let address = Address::Unix(directory.path().join("destination"));
    let destination = Arc::new(Fake::new());
    let made = Arc::clone(&destination);
    let receiving = receive(Listener::bind(&address).unwrap(), true, move |_| Ok(Arc::clone(&made)));
    let (link, cancel) = (Link::connect(&address).unwrap(), Cancel::default());
    let report = source::migrate(&source, link, &Options::default(), None, &cancel, &mut guest).unwrap();
    receiving.arrives().unwrap();
    assert!(source.content() == destination.content());
    let expected = PagesByClass { hole: holes, zero: empty, hot: PAGES - holes - empty, cold: 0 };
    assert_eq!((report.pages, report.resent), (expected, 7));
}
