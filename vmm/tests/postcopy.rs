//! What post-copy sends, between two machines without KVM: the guest is a thread that reads and writes its memory where it
//! runs, faults are the kernel's own, and the connections go through somebody in the middle who cuts them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

mod support;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use memory_agent::ByteSize;
use support::post_copy::{
    Fate, HOLES, LAZY, Middle, believed_cold, can_handle_faults, migrate, migrate_among, receive_as,
};
use support::{Fake, PAGE, PAGES};
use thermocline::migration::cancel::Cancel;
use thermocline::migration::channels::Channels;
use thermocline::migration::link::{Address, Link, Listener};
use thermocline::migration::progress::Progress;
use thermocline::migration::source::{self, Options, PostCopyControl, SourceError};
use thermocline::migration::wire::MigrationId;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn all_pages_follow_the_guest() {
    let Some(moved) = migrate(ByteSize(0), 0) else { return };
    moved.must_be_whole();
    let post_copy = moved.report.post_copy.unwrap();
    assert!(post_copy.pages >= PAGES / 5 * 4 && post_copy.cuts == 0, "{post_copy:?}");
    assert_eq!(post_copy.given_back, post_copy.pages * PAGE as u64);
    assert!(post_copy.faults.is_some() && moved.report.destination.is_some(), "{:?}", moved.report);
}

#[test]
fn the_guest_gets_what_it_waits_for_at_once() {
    // In the background a page every 4 ms.
    let Some(moved) = migrate(ByteSize::mib(1), 0) else { return };
    moved.must_be_whole();
    let post_copy = moved.report.post_copy.unwrap();
    let faults = post_copy.faults.unwrap();
    assert!(
        post_copy.requested > 0 && post_copy.neighbours > 0 && faults.count >= post_copy.requested.min(20),
        "{post_copy:?}"
    );
}

#[test]
fn a_connection_that_breaks_loses_nothing() {
    let Some(moved) = migrate(ByteSize::mib(1), 12) else { return };
    moved.must_be_whole();
    let post_copy = moved.report.post_copy.unwrap();
    assert!(post_copy.cuts >= 1, "{post_copy:?}");
}

/// Strangers at the door neither end a migration nor keep its two sides from meeting again.
#[test]
fn a_crowd_of_strangers_is_no_matter() {
    let started = std::time::Instant::now();
    let Some(moved) = migrate_among(ByteSize::mib(1), 2, 30) else { return };
    moved.must_be_whole();
    assert!(moved.report.post_copy.unwrap().cuts >= 1, "{:?}", moved.report);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

/// Wherever the first connection breaks: exactly one side runs the guest, or the source says that it cannot know; and where the
/// destination runs it, all of its memory comes over new connections. Whether it moved.
fn check_one_owner(limit: u64) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let (front, back) = (directory.path().join("front"), directory.path().join("back"));
    let listener = Listener::bind(&Address::Unix(back.clone())).unwrap();
    let _middle = Middle::new(&front, &back, vec![Fate::Cut(limit)]);
    let (source, destination) = (believed_cold(), Arc::new(Fake::new()));
    let content = source.content();
    let receiving = receive_as(listener, true, &destination);
    let address = Address::Unix(front);
    let post_copy_source =
        Arc::new(PostCopyControl::new(Channels::new(MigrationId::new().unwrap()), Some(address.clone())));
    let (source_result, destination_result) = thread::scope(|scope| {
        let (source, migrating) = (&source, Arc::clone(&post_copy_source));
        let migration = scope.spawn(move || {
            let link = Link::connect(&address).unwrap();
            source::migrate(source, link, &LAZY, Some(&migrating), &Cancel::default(), &mut |_: &Progress| {})
        });
        let destination_result = receiving.arrives();
        if destination_result.is_err() {
            // Somebody sees that the guest does not run there, and need not wait for its word.
            while !migration.is_finished() && post_copy_source.left() == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            post_copy_source.channels.close();
        }
        (migration.join().unwrap(), destination_result)
    });
    let runs = (source.runs(), destination.runs());
    match (&source_result, &destination_result) {
        (Ok(_), Ok(())) => {
            assert_eq!(runs, (false, true), "{limit}");
            assert!(content == destination.content(), "{limit}: memory differs");
            assert_eq!(source.ram.counts().unwrap().hole, PAGES, "{limit}: left at the source");
        }
        (Err(SourceError::Unconfirmed(_)), Err(_)) => {
            assert_eq!(runs, (false, false), "{limit}");
            assert!(content == source.content(), "{limit}: memory is lost");
        }
        (Err(_), Err(_)) => {
            assert_eq!(runs, (true, false), "{limit}: {source_result:?}, {destination_result:?}");
            assert!(content == source.content(), "{limit}: memory is lost");
        }
        (source, destination) => panic!("{limit}: source {source:?}, destination {destination:?}"),
    }
    source_result.is_ok()
}

#[test]
fn the_first_connection_may_break_after_any_byte() {
    if !can_handle_faults() {
        return;
    }
    let mut moved = [0, 0];
    for limit in (0..1200).step_by(15).chain((1200..400_000).step_by(40_001)) {
        moved[usize::from(check_one_owner(limit))] += 1;
    }
    // Some broke before the guest went, and some behind that.
    assert!(moved[0] > 10 && moved[1] >= 8, "{moved:?}");
}

/// In the middle of a page that the guest waits for nothing more comes: whoever touches a hole goes on, and the page comes over
/// a new connection.
#[test]
fn half_a_page_holds_nobody_else_up() {
    /// What names the fault channel, and less than a page behind it.
    const HALF: u64 = 1000;
    const HOLE: u64 = HOLES[1];
    if !can_handle_faults() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (front, back) = (directory.path().join("front"), directory.path().join("back"));
    let listener = Listener::bind(&Address::Unix(back.clone())).unwrap();
    let middle = Middle::new(&front, &back, vec![Fate::Cut(u64::MAX), Fate::Stall(HALF)]);
    let (source, destination) = (believed_cold(), Arc::new(Fake::new()));
    let mut content = vec![0; PAGES as usize * PAGE];
    // Not through its mapping: a hole stays one.
    source.ram.read_through_file(source.ram.all_pages(), &mut content).unwrap();
    let receiving = receive_as(listener, true, &destination);
    let address = Address::Unix(front);
    let post_copy_source =
        Arc::new(PostCopyControl::new(Channels::new(MigrationId::new().unwrap()), Some(address.clone())));
    thread::scope(|scope| {
        let migration = scope.spawn(|| {
            // In the background a batch, and then nothing for longer than this takes.
            let options = Options { cold_rate: ByteSize(1), ..LAZY };
            let link = Link::connect(&address).unwrap();
            source::migrate(
                &source,
                link,
                &options,
                Some(&post_copy_source),
                &Cancel::default(),
                &mut |_: &Progress| {},
            )
        });
        while !destination.runs() {
            thread::sleep(Duration::from_millis(1));
        }
        let read = |page: u64| {
            let mut bytes = [0; PAGE];
            destination.ram.memory().read_slice(&mut bytes, GuestAddress(page * PAGE as u64)).unwrap();
            bytes
        };
        let waits = scope.spawn(move || read(PAGES - 1));
        thread::sleep(Duration::from_millis(100));
        let hole = scope.spawn(move || read(HOLE));
        thread::sleep(Duration::from_secs(1));
        let (is_stuck, is_filled) = (!waits.is_finished(), hole.is_finished());
        middle.cut();
        assert!(is_stuck, "the page came though nothing did");
        assert!(is_filled, "a hole waited for a connection");
        assert_eq!(hole.join().unwrap(), [0; PAGE]);
        for page in 0..PAGES {
            assert!(read(page)[..] == content[page as usize * PAGE..][..PAGE], "page {page}");
        }
        waits.join().unwrap();
        receiving.arrives().unwrap();
        migration.join().unwrap().unwrap();
    });
}
