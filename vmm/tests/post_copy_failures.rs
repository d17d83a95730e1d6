//! Post-copy where something fails: the host has no memory for a page, the channel for faults ends at the worst moment, a vCPU
//! cannot stop. No write of the guest is ever lost, and nobody waits for ever.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

mod support;

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use memory_agent::{ByteSize, PageNumber};
use support::post_copy::{Fate, HOLES, LAZY, Middle, believed_cold, can_handle_faults, migrate_to};
use support::{Fake, PAGE, PAGES, Receiving, receive_with};
use thermocline::migration::cancel::Cancel;
use thermocline::migration::channels::Channels;
use thermocline::migration::destination::Terms;
use thermocline::migration::link::{Address, Link, Listener, SILENCE_LIMIT};
use thermocline::migration::progress::{Progress, Report};
use thermocline::migration::source::{self, Options, PostCopyControl, SourceError};
use thermocline::migration::wire::MigrationId;
use thermocline::ram::{GuestRam, MissingPages, MissingRam, NotLanded, RamError, RamPage, ReadPages};
use vm_memory::{Bytes, GuestAddress};

/// A page of post-copy.
const FOLLOWS: u64 = PAGES - 1;
/// Far more than anything here takes that does not wait for ever.
const FOR_EVER: Duration = Duration::from_secs(20);

/// Guest RAM of a host that has no memory now and then.
struct Failing {
    missing: MissingRam,
    /// Every so many-th page cannot land.
    nth: u64,
    pages: AtomicU64,
    failures: AtomicU64,
    /// No hole can be filled.
    no_zeros: AtomicBool,
    zeroed: Mutex<Vec<RamPage>>,
}

impl Failing {
    fn under(destination: &Fake, nth: u64) -> Arc<Self> {
        let failing = Arc::new(Self {
            missing: MissingRam::new(Arc::clone(&destination.ram)).unwrap(),
            nth,
            pages: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            no_zeros: AtomicBool::new(false),
            zeroed: Mutex::default(),
        });
        destination.hooks.lock().unwrap().missing = Some(Arc::clone(&failing) as Arc<dyn MissingPages>);
        failing
    }

    fn no_memory(&self, page: RamPage) -> RamError {
        self.failures.fetch_add(1, Ordering::SeqCst);
        RamError::Access { page, what: "written", cause: std::io::ErrorKind::OutOfMemory.into() }
    }

    /// Page by page, up to the first that fails.
    fn one_by_one(
        &self,
        first: RamPage,
        data: &[u8],
        put: impl Fn(RamPage, &[u8]) -> Result<(), NotLanded>,
    ) -> Result<(), NotLanded> {
        for (landed, (page, data)) in (0..).zip(data.chunks(PAGE)).map(|(i, data)| (i, (first + i, data))) {
            if (self.pages.fetch_add(1, Ordering::SeqCst) + 1).is_multiple_of(self.nth) {
                return Err(NotLanded { landed, why: self.no_memory(page) });
            }
            put(page, data)?;
        }
        Ok(())
    }
}

impl AsFd for Failing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.missing.as_fd()
    }
}

impl MissingPages for Failing {
    fn read(&self, each: &mut dyn FnMut(RamPage)) -> Result<(), RamError> {
        self.missing.read(each)
    }
    fn fill(&self, first: RamPage, data: &[u8]) -> Result<(), NotLanded> {
        self.one_by_one(first, data, |page, data| self.missing.fill(page, data))
    }
    fn land(&self, first: RamPage, data: &[u8]) -> Result<(), NotLanded> {
        self.one_by_one(first, data, |page, data| self.missing.land(page, data))
    }
    fn zero(&self, page: RamPage) -> Result<(), RamError> {
        if self.no_zeros.load(Ordering::SeqCst) {
            return Err(self.no_memory(page));
        }
        self.zeroed.lock().unwrap().push(page);
        self.missing.zero(page)
    }
    fn wake(&self, pages: Range<RamPage>) -> Result<(), RamError> {
        self.missing.wake(pages)
    }
    fn release(&self) {
        self.missing.release();
    }
}

#[test]
fn a_page_that_cannot_land_loses_no_write() {
    if !can_handle_faults() {
        return;
    }
    for (nth, cuts) in [(2, 0), (3, 8), (17, 8), (64, 0)] {
        let destination = Arc::new(Fake::new());
        let failing = Failing::under(&destination, nth);
        let moved = migrate_to(destination, ByteSize::mib(4), cuts);
        moved.must_be_whole();
        let failures = failing.failures.load(Ordering::SeqCst);
        assert!(failures >= PAGES / 5 * 4 / nth, "{failures} failures of every {nth}th page");
        // What has landed is no hole, whoever still waits for it.
        let zeroed = failing.zeroed.lock().unwrap();
        assert!(zeroed.iter().all(|page| HOLES.contains(&page.0)), "{zeroed:?}");
    }
}

/// A migration whose parts can be looked at while it goes on.
struct Moving {
    destination: Arc<Fake>,
    middle: Middle,
    content: Vec<u8>,
    migration: thread::JoinHandle<Result<Report, SourceError>>,
    receiving: Receiving,
    source: Arc<Fake>,
    post_copy_source: Arc<PostCopyControl>,
    _directory: tempfile::TempDir,
}

impl Moving {
    /// Towards `destination`, which loses its source after `source_timeout`; `cold_rate` bytes a second come that nobody waits for.
    fn start(destination: Fake, fates: Vec<Fate>, cold_rate: u64, source_timeout: Duration) -> Self {
        Self::start_with(Arc::new(believed_cold()), destination, fates, cold_rate, source_timeout)
    }

    fn start_with(
        source: Arc<Fake>,
        destination: Fake,
        fates: Vec<Fate>,
        cold_rate: u64,
        source_timeout: Duration,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (front, back) = (directory.path().join("front"), directory.path().join("back"));
        let listener = Listener::bind(&Address::Unix(back.clone())).unwrap();
        let middle = Middle::new(&front, &back, fates);
        let destination = Arc::new(destination);
        let mut content = vec![0; PAGES as usize * PAGE];
        // Not through its mapping: a hole stays one.
        source.ram.read_through_file(source.ram.all_pages(), &mut content).unwrap();
        let receiving = receive_with(listener, Terms { source_timeout, once: true }, {
            let destination = Arc::clone(&destination);
            move |_| Ok(Arc::clone(&destination))
        });
        let address = Address::Unix(front);
        let post_copy_source =
            Arc::new(PostCopyControl::new(Channels::new(MigrationId::new().unwrap()), Some(address.clone())));
        let migration = thread::spawn({
            let (source, post_copy_source) = (Arc::clone(&source), Arc::clone(&post_copy_source));
            move || {
                let options = Options { cold_rate: ByteSize(cold_rate), ..LAZY };
                let link = Link::connect(&address).unwrap();
                source::migrate(
                    &*source,
                    link,
                    &options,
                    Some(&post_copy_source),
                    &Cancel::default(),
                    &mut |_: &Progress| {},
                )
            }
        });
        Self { destination, middle, content, migration, receiving, source, post_copy_source, _directory: directory }
    }

    fn until_it_runs(&self) {
        eventually(|| self.destination.runs());
    }

    /// Reads as the guest does, and waits as it does.
    fn read(&self, page: u64) -> thread::JoinHandle<[u8; PAGE]> {
        let destination = Arc::clone(&self.destination);
        thread::spawn(move || read(&destination, page))
    }

    fn must_arrive_whole(self) {
        // The guest wants what it has, which is quicker than what comes by itself.
        for page in 0..PAGES {
            let content = &self.content[page as usize * PAGE..][..PAGE];
            assert!(read(&self.destination, page)[..] == *content, "page {page}");
        }
        self.migration.join().unwrap().unwrap();
        self.receiving.arrives().unwrap();
        assert!(self.destination.runs() && !self.source.runs());
    }

    /// The guest goes on at the source, as if nothing had been.
    fn must_be_given_up(self) {
        self.must_be_given_up_within(FOR_EVER);
    }

    fn must_be_given_up_within(self, limit: Duration) {
        let started = Instant::now();
        self.receiving.arrives().unwrap_err();
        self.migration.join().unwrap().unwrap_err();
        assert!(started.elapsed() < limit, "{:?}", started.elapsed());
        assert!(self.source.runs() && !self.destination.runs());
        assert!(self.source.content() == self.content);
    }
}

fn read(machine: &Fake, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    machine.ram.memory().read_slice(&mut bytes, GuestAddress(page * PAGE as u64)).unwrap();
    bytes
}

fn eventually(mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < FOR_EVER, "it does not come to pass");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A hole that cannot be filled keeps nobody else waiting: not another page, not a new connection, not the end.
#[test]
fn a_fault_that_fails_keeps_no_other_waiting() {
    if !can_handle_faults() {
        return;
    }
    let destination = Fake::new();
    let failing = Failing::under(&destination, u64::MAX);
    failing.no_zeros.store(true, Ordering::SeqCst);
    let moving = Moving::start(destination, Vec::new(), 1, FOR_EVER);
    moving.until_it_runs();
    let waits = moving.read(HOLES[1]);
    eventually(|| failing.failures.load(Ordering::SeqCst) > 0);
    let content = |page: u64| moving.content[page as usize * PAGE..][..PAGE].to_vec();
    assert!(moving.read(FOLLOWS).join().unwrap()[..] == content(FOLLOWS));
    moving.middle.cut();
    assert!(moving.read(FOLLOWS - 65).join().unwrap()[..] == content(FOLLOWS - 65));
    assert!(!waits.is_finished());
    failing.no_zeros.store(false, Ordering::SeqCst);
    assert_eq!(waits.join().unwrap(), [0; PAGE]);
    moving.must_arrive_whole();
}

/// The machine is restored, and the host waits for a page for that, when the source goes away.
#[test]
fn a_source_that_goes_while_the_machine_is_restored_keeps_nobody_waiting() {
    /// What names the fault channel, and less than a page behind it.
    const HALF: u64 = 1000;
    if !can_handle_faults() {
        return;
    }
    let destination = Fake::new();
    let touches = Arc::new(AtomicBool::new(false));
    destination.hooks.lock().unwrap().restoring = Some(Box::new({
        let touches = Arc::clone(&touches);
        move |machine| {
            touches.store(true, Ordering::SeqCst);
            read(machine, FOLLOWS);
        }
    }));
    let moving = Moving::start(destination, vec![Fate::Cut(u64::MAX), Fate::Stall(HALF)], 1, FOR_EVER);
    eventually(|| touches.load(Ordering::SeqCst));
    moving.middle.cut();
    moving.must_be_given_up();
}

/// The same where the source lives, and the channel alone goes.
#[test]
fn a_fault_channel_that_goes_while_the_machine_is_restored_keeps_nobody_waiting() {
    /// What names the fault channel, and no more than the beginning of a page.
    const HALF: u64 = 1000;
    if !can_handle_faults() {
        return;
    }
    let destination = Fake::new();
    destination.hooks.lock().unwrap().restoring = Some(Box::new(|machine| {
        read(machine, FOLLOWS);
    }));
    Moving::start(destination, vec![Fate::Cut(u64::MAX), Fate::Cut(HALF)], 1, FOR_EVER).must_be_given_up();
}

/// What the host waits for while it restores comes, where nothing fails.
#[test]
fn restoring_may_touch_what_has_not_come() {
    if !can_handle_faults() {
        return;
    }
    let destination = Fake::new();
    let seen = Arc::new(Mutex::new(None));
    destination.hooks.lock().unwrap().restoring = Some(Box::new({
        let seen = Arc::clone(&seen);
        move |machine| *seen.lock().unwrap() = Some(read(machine, FOLLOWS)[0])
    }));
    let moving = Moving::start(destination, Vec::new(), 0, FOR_EVER);
    moving.until_it_runs();
    assert_eq!(*seen.lock().unwrap(), Some(FOLLOWS as u8 | 1));
    moving.must_arrive_whole();
}

/// The fault channel goes when the guest is ours and nobody receives yet: both channels are made anew.
#[test]
fn the_fault_channel_may_go_before_anybody_receives() {
    if !can_handle_faults() {
        return;
    }
    let destination = Fake::new();
    let (resume, may_go) = std::sync::mpsc::channel();
    destination.hooks.lock().unwrap().resuming = Some(Box::new(move |_| may_go.recv().unwrap()));
    let moving = Moving::start(destination, Vec::new(), 1, FOR_EVER);
    // The source has handed the guest over, and the destination is about to let it run.
    eventually(|| moving.destination.state.lock().unwrap().is_some());
    thread::sleep(Duration::from_millis(100));
    moving.middle.cut_one(1);
    thread::sleep(Duration::from_millis(100));
    resume.send(()).unwrap();
    moving.until_it_runs();
    moving.must_arrive_whole();
}

/// The same where the destination alone knows that the channel has gone: it gives up the other one too, so that the source makes
/// both anew. Else nobody would be asked for what the guest waits for.
#[test]
fn a_fault_channel_that_only_the_destination_has_lost_is_made_anew() {
    if !can_handle_faults() {
        return;
    }
    let destination = Fake::new();
    let (resume, may_go) = std::sync::mpsc::channel();
    destination.hooks.lock().unwrap().resuming = Some(Box::new(move |_| may_go.recv().unwrap()));
    let moving = Moving::start(destination, Vec::new(), 1, FOR_EVER);
    eventually(|| moving.destination.state.lock().unwrap().is_some());
    thread::sleep(Duration::from_millis(100));
    moving.middle.cut_at_destination(1);
    thread::sleep(Duration::from_millis(100));
    resume.send(()).unwrap();
    moving.until_it_runs();
    let waits = moving.read(FOLLOWS);
    eventually(|| waits.is_finished());
    assert_eq!(moving.middle.connections(), 4);
    moving.must_arrive_whole();
}

/// What the host waits for while it restores does not come, and no end of a connection says so: half a minute is enough.
#[test]
fn a_silent_source_keeps_nobody_waiting_who_restores() {
    /// What names the fault channel, and less than a page behind it.
    const HALF: u64 = 1000;
    if !can_handle_faults() {
        return;
    }
    let destination = Fake::new();
    let touched = Arc::new(Mutex::new(None));
    destination.hooks.lock().unwrap().restoring = Some(Box::new({
        let touched = Arc::clone(&touched);
        move |machine| {
            *touched.lock().unwrap() = Some(Instant::now());
            read(machine, FOLLOWS);
        }
    }));
    let moving = Moving::start(destination, vec![Fate::Cut(u64::MAX), Fate::Stall(HALF)], 1, FOR_EVER);
    // The source gives up by itself; the destination does not see that.
    moving.middle.keep(1);
    let arrives = thread::spawn(move || moving.must_be_given_up_within(SILENCE_LIMIT * 2));
    eventually(|| touched.lock().unwrap().is_some());
    let touched = touched.lock().unwrap().unwrap();
    while !arrives.is_finished() {
        assert!(touched.elapsed() < SILENCE_LIMIT * 2, "whoever restores waits for ever");
        thread::sleep(Duration::from_millis(50));
    }
    arrives.join().unwrap();
    assert!(touched.elapsed() >= SILENCE_LIMIT, "{:?}", touched.elapsed());
}

/// A vCPU for which the host waits for a page cannot stop. The source is taken for lost, and comes back: the page comes.
#[test]
fn a_vcpu_that_cannot_stop_keeps_no_source_out() {
    if !can_handle_faults() {
        return;
    }
    let moving = Moving::start(Fake::new(), Vec::new(), 1, Duration::from_millis(300));
    moving.until_it_runs();
    moving.middle.refuse(true);
    moving.middle.cut();
    let waits = thread::spawn({
        let destination = Arc::clone(&moving.destination);
        move || {
            let _executing = destination.executing.lock().unwrap();
            read(&destination, FOLLOWS)
        }
    });
    eventually(|| !moving.destination.runs());
    // Whoever would stop it has had time to wait for it.
    thread::sleep(Duration::from_millis(300));
    assert!(!waits.is_finished());
    moving.middle.refuse(false);
    assert!(waits.join().unwrap()[..] == moving.content[FOLLOWS as usize * PAGE..]);
    eventually(|| moving.destination.runs());
    moving.must_arrive_whole();
}

/// The same where nobody comes back: whoever gives the guest up is not kept waiting by that vCPU.
#[test]
fn a_vcpu_that_cannot_stop_keeps_nobody_from_giving_up() {
    if !can_handle_faults() {
        return;
    }
    let moving = Moving::start(Fake::new(), Vec::new(), 1, Duration::from_millis(300));
    let post_copy = moving.receiving.runs().unwrap();
    let waits = thread::spawn({
        let destination = Arc::clone(&moving.destination);
        move || {
            let _executing = destination.executing.lock().unwrap();
            moving.middle.refuse(true);
            moving.middle.cut();
            (moving.middle, read(&destination, FOLLOWS)[0])
        }
    });
    eventually(|| !moving.destination.runs());
    assert!(!waits.is_finished());
    post_copy.end();
    moving.receiving.arrives().unwrap();
    // It sees no memory of the guest's, and runs no more.
    let (middle, seen) = waits.join().unwrap();
    assert_eq!(seen, 0);
    assert!(!moving.destination.runs());
    middle.refuse(false);
    moving.post_copy_source.channels.close();
    moving.migration.join().unwrap().unwrap();
}

/// Guest RAM of a host whose swap device fails: some pages cannot be read.
struct Unreadable {
    ram: Arc<GuestRam>,
    pages: Range<RamPage>,
    fails: Arc<AtomicBool>,
}

impl ReadPages for Unreadable {
    fn read_page(&self, page: RamPage, bytes: &mut [u8]) -> Result<(), RamError> {
        if self.pages.contains(&page) && self.fails.load(Ordering::SeqCst) {
            return Err(RamError::Access { page, what: "read", cause: std::io::Error::from_raw_os_error(5) });
        }
        self.ram.read_page(page, bytes)
    }
}

/// A page that cannot be read keeps no other back and breaks no connection; once it can be read, it comes.
#[test]
fn a_page_that_cannot_be_read_is_the_only_one_that_does_not_come() {
    if !can_handle_faults() {
        return;
    }
    let source = Arc::new(believed_cold());
    let fails = Arc::new(AtomicBool::new(true));
    let unreadable = Unreadable { ram: Arc::clone(&source.ram), pages: RamPage(100).run(3), fails: Arc::clone(&fails) };
    source.hooks.lock().unwrap().reader = Some(Arc::new(unreadable));
    let moving = Moving::start_with(source, Fake::new(), Vec::new(), 0, FOR_EVER);
    let post_copy = moving.receiving.runs().unwrap();
    let waits = moving.read(101);
    eventually(|| post_copy.status().missing == 3);
    assert_eq!(post_copy.missing(), [RamPage(100).run(3)]);
    assert!(!waits.is_finished());
    assert_eq!(moving.middle.connections(), 2);
    fails.store(false, Ordering::SeqCst);
    assert!(waits.join().unwrap()[..] == moving.content[101 * PAGE..][..PAGE]);
    moving.must_arrive_whole();
}

/// Connections over which nothing gets are made ever more seldom.
#[test]
fn a_connection_that_never_works_is_not_made_without_a_pause() {
    /// Less than a page.
    const LITTLE: u64 = 2000;
    const WHILE: Duration = Duration::from_secs(3);
    if !can_handle_faults() {
        return;
    }
    let mut fates = vec![Fate::Cut(u64::MAX); 2];
    fates.resize(10_000, Fate::Cut(LITTLE));
    let moving = Moving::start(Fake::new(), fates, 1, FOR_EVER);
    let post_copy = moving.receiving.runs().unwrap();
    moving.middle.cut();
    thread::sleep(WHILE);
    // 100, 200, 400, 800 and 1600 ms apart, two at a time.
    let connections = moving.middle.connections();
    assert!((8..=16).contains(&connections), "{connections} connections");
    assert!(post_copy.status().missing > 0);
    post_copy.end();
    moving.receiving.arrives().unwrap();
    moving.post_copy_source.channels.close();
    moving.migration.join().unwrap().unwrap();
}
