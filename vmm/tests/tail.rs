//! What follows a guest, between two machines without KVM: the guest is a thread that reads and writes its memory where it
//! runs, faults are the kernel's own, and the connections go through somebody in the middle who cuts them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

mod support;

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use memory_agent::{ByteSize, Counts, Hint, PageState, Residency};
use support::{Fake, PAGE, PAGES, Receiving, receive};
use thermocline::migration::cancel::Cancel;
use thermocline::migration::link::{Address, Link, Listener};
use thermocline::migration::plan::ColdPolicy;
use thermocline::migration::progress::{Progress, Report};
use thermocline::migration::rendezvous::Rendezvous;
use thermocline::migration::source::{self, Following, Options, SourceError, Switchover};
use thermocline::migration::wire::Session;
use thermocline::migration::{Belief, SourceMachine};
use vm_memory::{Bytes, GuestAddress};

/// A guest that knows what is in its memory, wherever it runs.
struct Guest {
    truth: Vec<u8>,
    random: u64,
}

impl Guest {
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    /// Reads a page, checks it, and writes it now and then.
    fn step(&mut self, machine: &Fake) {
        let page = self.below(PAGES);
        let mut bytes = [0; PAGE];
        machine.ram.memory().read_slice(&mut bytes, GuestAddress(page * PAGE as u64)).unwrap();
        let expected = self.truth[page as usize];
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page}: {} where {expected} was", bytes[0]);
        if self.below(3) == 0 {
            let value = self.below(200) as u8;
            machine.write(page, value);
            self.truth[page as usize] = value;
        }
    }
}

/// What becomes of a connection once so many bytes have gone to the destination over it.
#[derive(Clone, Copy)]
enum Fate {
    Cut(u64),
    /// It stays, and nothing more comes.
    Stall(u64),
}

/// Passes connections on, and cuts all of them when told to.
struct Middle {
    open: Arc<Mutex<Vec<UnixStream>>>,
}

impl Middle {
    /// `fates` are those of the first connections; all others live.
    fn new(here: &Path, there: &Path, fates: Vec<Fate>) -> Self {
        let listener = UnixListener::bind(here).unwrap();
        let open = Arc::new(Mutex::new(Vec::new()));
        let (there, passing) = (there.to_owned(), Arc::clone(&open));
        thread::spawn(move || {
            for (number, from) in listener.incoming().map_while(Result::ok).enumerate() {
                let Ok(to) = UnixStream::connect(&there) else { continue };
                let fate = fates.get(number).copied().unwrap_or(Fate::Cut(u64::MAX));
                for (from, mut to, fate) in [
                    (from.try_clone().unwrap(), to.try_clone().unwrap(), fate),
                    (to.try_clone().unwrap(), from.try_clone().unwrap(), Fate::Cut(u64::MAX)),
                ] {
                    thread::spawn(move || {
                        let (Fate::Cut(limit) | Fate::Stall(limit)) = fate;
                        let _ = std::io::copy(&mut (&from).take(limit), &mut to);
                        if let Fate::Stall(_) = fate {
                            // Until somebody cuts it.
                            let _ = std::io::copy(&mut &from, &mut std::io::sink());
                        }
                        let _ = to.shutdown(Shutdown::Both);
                        let _ = from.shutdown(Shutdown::Both);
                    });
                }
                passing.lock().unwrap().extend([from, to]);
            }
        });
        Self { open }
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn can_handle_faults() -> bool {
    let Some(why) = thermocline::ram::why_no_faults() else { return true };
    let must = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!must, "{why}");
    eprintln!("skipped: {why}");
    false
}

/// A machine whose pages follow it, all of them: somebody believes that they are swapped.
fn believed_cold() -> Fake {
    let source = Fake::new();
    for page in (0..PAGES).filter(|page| page % 5 != 0) {
        source.write(page, page as u8 | 1);
    }
    let believed = Hint::of(Residency::uniform(PAGES, PageState::Swapped));
    *source.believed.lock().unwrap() = Some(Belief { hint: believed, probe: "liar" });
    SourceMachine::resume(&source);
    source
}

const LAZY: Options = Options {
    cold: ColdPolicy::Lazy,
    window: ByteSize::mib(16),
    downtime_limit: Duration::from_millis(300),
    max_rounds: 50,
    switchover: Switchover::Now,
    cold_rate: ByteSize(0),
};

/// Receives a machine and all that follows it.
fn receive_as(listener: Listener, once: bool, destination: &Arc<Fake>) -> Receiving {
    let destination = Arc::clone(destination);
    receive(listener, once, move |_| Ok(Arc::clone(&destination)))
}

struct Moved {
    report: Report,
    source: Arc<Fake>,
    destination: Arc<Fake>,
    truth: Vec<u8>,
}

/// Moves a guest whose every page is believed to be swapped, so that all of them follow it; cuts the connections `cuts` times
/// once it runs there.
fn migrate(cold_rate: ByteSize, cuts: u32) -> Option<Moved> {
    migrate_among(cold_rate, cuts, 0)
}

/// The same while `strangers` more are connected to the destination at any time who have nothing to say.
fn migrate_among(cold_rate: ByteSize, cuts: u32, strangers: usize) -> Option<Moved> {
    if !can_handle_faults() {
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let (front, back) = (directory.path().join("front"), directory.path().join("back"));
    let listener = Listener::bind(&Address::Unix(back.clone())).unwrap();
    let middle = Middle::new(&front, &back, Vec::new());
    let (source, destination) = (Arc::new(believed_cold()), Arc::new(Fake::new()));
    let mut guest = Guest { truth: vec![0; PAGES as usize], random: 0x7e57 + u64::from(cuts) };
    for page in (0..PAGES).filter(|page| page % 5 != 0) {
        guest.truth[page as usize] = page as u8 | 1;
    }
    let ended = Arc::new(AtomicBool::new(false));
    let guest = thread::spawn({
        let (source, destination, ended) = (Arc::clone(&source), Arc::clone(&destination), Arc::clone(&ended));
        move || {
            while !ended.load(Ordering::SeqCst) {
                if destination.runs() {
                    guest.step(&destination);
                } else {
                    let _executing = source.executing.lock().unwrap();
                    if source.runs() {
                        guest.step(&source);
                    }
                }
                thread::sleep(Duration::from_micros(50));
            }
            guest.truth
        }
    });
    let receiving = receive_as(listener, strangers == 0, &destination);
    let crowd = move |there: &Path| -> Vec<_> { (0..strangers).map(|_| UnixStream::connect(there).unwrap()).collect() };
    let before = crowd(&back);
    let cutting = thread::spawn({
        let destination = Arc::clone(&destination);
        move || {
            let mut meanwhile = before;
            while !destination.runs() {
                thread::sleep(Duration::from_millis(1));
            }
            for n in 0..cuts {
                thread::sleep(Duration::from_millis(u64::from(2 + n * 7 % 11)));
                meanwhile = crowd(&back);
                middle.cut();
            }
            (middle, meanwhile)
        }
    });
    let address = Address::Unix(front);
    let following = Following::new(Rendezvous::new(Session::new().unwrap()), Some(address.clone()));
    let options = Options { cold_rate, ..LAZY };
    let report = source::migrate(
        source.as_ref(),
        Link::connect(&address).unwrap(),
        &options,
        Some(&Arc::new(following)),
        &Cancel::default(),
        &mut |_: &Progress| {},
    )
    .unwrap();
    receiving.arrives().unwrap();
    ended.store(true, Ordering::SeqCst);
    let truth = guest.join().unwrap();
    drop(cutting.join().unwrap());
    Some(Moved { report, source, destination, truth })
}

impl Moved {
    fn must_be_whole(&self) {
        assert!(!self.source.runs() && self.destination.runs());
        assert_eq!(
            self.source.ram.counts().unwrap(),
            Counts { hole: PAGES, ..Counts::default() },
            "left at the source"
        );
        let content = self.destination.content();
        for (page, (bytes, expected)) in content.chunks(PAGE).zip(&self.truth).enumerate() {
            assert!(bytes.iter().all(|byte| byte == expected), "page {page}");
        }
    }
}

#[test]
fn all_pages_follow_the_guest() {
    let Some(moved) = migrate(ByteSize(0), 0) else { return };
    moved.must_be_whole();
    let tail = moved.report.tail.unwrap();
    assert!(tail.pages >= PAGES / 5 * 4 && tail.cuts == 0, "{tail:?}");
    assert_eq!(tail.given_back, tail.pages * PAGE as u64);
    assert!(tail.faults.is_some() && moved.report.destination.is_some(), "{:?}", moved.report);
}

#[test]
fn the_guest_gets_what_it_waits_for_at_once() {
    // In the background a page every 4 ms.
    let Some(moved) = migrate(ByteSize::mib(1), 0) else { return };
    moved.must_be_whole();
    let tail = moved.report.tail.unwrap();
    let faults = tail.faults.unwrap();
    assert!(tail.wanted > 0 && tail.neighbours > 0 && faults.count >= tail.wanted.min(20), "{tail:?}");
}

#[test]
fn a_connection_that_breaks_loses_nothing() {
    let Some(moved) = migrate(ByteSize::mib(1), 12) else { return };
    moved.must_be_whole();
    let tail = moved.report.tail.unwrap();
    assert!(tail.cuts >= 1, "{tail:?}");
}

/// Strangers at the door neither end a migration nor keep its two sides from meeting again.
#[test]
fn a_crowd_of_strangers_is_no_matter() {
    let started = std::time::Instant::now();
    let Some(moved) = migrate_among(ByteSize::mib(1), 2, 30) else { return };
    moved.must_be_whole();
    assert!(moved.report.tail.unwrap().cuts >= 1, "{:?}", moved.report);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

/// Wherever the first connection breaks: exactly one side runs the guest, or the source says that it cannot know; and where the
/// destination runs it, all of its memory follows over new connections. Whether it moved.
fn check_one_owner(limit: u64) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let (front, back) = (directory.path().join("front"), directory.path().join("back"));
    let listener = Listener::bind(&Address::Unix(back.clone())).unwrap();
    let _middle = Middle::new(&front, &back, vec![Fate::Cut(limit)]);
    let (source, destination) = (believed_cold(), Arc::new(Fake::new()));
    let content = source.content();
    let receiving = receive_as(listener, true, &destination);
    let address = Address::Unix(front);
    let following = Arc::new(Following::new(Rendezvous::new(Session::new().unwrap()), Some(address.clone())));
    let (source_result, destination_result) = thread::scope(|scope| {
        let (source, migrating) = (&source, Arc::clone(&following));
        let migration = scope.spawn(move || {
            let link = Link::connect(&address).unwrap();
            source::migrate(source, link, &LAZY, Some(&migrating), &Cancel::default(), &mut |_: &Progress| {})
        });
        let destination_result = receiving.arrives();
        if destination_result.is_err() {
            // Somebody sees that the guest does not run there, and need not wait for its word.
            while !migration.is_finished() && following.left() == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            following.rendezvous.close();
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
    const HOLE: u64 = 5;
    if !can_handle_faults() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (front, back) = (directory.path().join("front"), directory.path().join("back"));
    let listener = Listener::bind(&Address::Unix(back.clone())).unwrap();
    let middle = Middle::new(&front, &back, vec![Fate::Cut(u64::MAX), Fate::Stall(HALF)]);
    let (source, destination) = (believed_cold(), Arc::new(Fake::new()));
    let content = source.content();
    let receiving = receive_as(listener, true, &destination);
    let address = Address::Unix(front);
    let following = Arc::new(Following::new(Rendezvous::new(Session::new().unwrap()), Some(address.clone())));
    thread::scope(|scope| {
        let migration = scope.spawn(|| {
            // In the background a batch, and then nothing for longer than this takes.
            let options = Options { cold_rate: ByteSize(1), ..LAZY };
            let link = Link::connect(&address).unwrap();
            source::migrate(&source, link, &options, Some(&following), &Cancel::default(), &mut |_: &Progress| {})
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
