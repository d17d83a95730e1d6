//! Disks whose host fails, or takes its time.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::super::engine::{Ended, Operation};
use super::*;

/// Does nothing, and says of each operation what it was told to; of writes and flushes only once it may.
#[derive(Debug)]
struct Fake {
    result: i32,
    /// Operations may end.
    may_end: Arc<AtomicBool>,
    /// Set when they may.
    event: EventFd,
    most: Arc<AtomicUsize>,
    flying: Vec<Ended>,
}

impl Default for Fake {
    fn default() -> Self {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self { result: 0, may_end: Arc::new(AtomicBool::new(true)), event, most: Arc::default(), flying: Vec::new() }
    }
}

impl Engine for Fake {
    fn begin(&mut self, number: u64, operation: Operation) -> io::Result<()> {
        self.flying.push((number, operation, self.result));
        self.most.fetch_max(self.flying(), Ordering::SeqCst);
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn has_ended(&mut self) -> bool {
        // Reads never hang, as with a file system that is frozen.
        let is_ended = |ended: &Ended| matches!(ended.1, Operation::Read(..)) || self.may_end.load(Ordering::SeqCst);
        self.flying.iter().any(is_ended)
    }

    fn ended(&mut self) -> Option<Ended> {
        let may_end = self.may_end.load(Ordering::SeqCst);
        let at = self.flying.iter().position(|ended| may_end || matches!(ended.1, Operation::Read(..)))?;
        Some(self.flying.remove(at))
    }

    fn flying(&self) -> usize {
        self.flying.len()
    }

    fn event(&self) -> Option<RawFd> {
        Some(self.event.as_raw_fd())
    }
}

/// The worker of a disk with such an engine, at work.
fn worker(fake: Fake) -> (Worker, Driver, Arc<Notified>) {
    let (_folder, path) = image(SECTORS);
    let image = Arc::new(backend(&path).open().unwrap());
    let driver = Driver::new(&Arc::new(GuestRam::new(RAM).unwrap()), 0, 128, 0);
    let (activation, notified) = activation(&[&driver], 0);
    let serving = Serving::new(&activation, &driver.queue, &config(false), &image, Box::new(fake));
    let worker = Worker::new("disk", &activation, &activation.queues, serving).unwrap();
    worker.resume();
    (worker, driver, notified)
}

#[test]
fn an_error_of_the_host_is_the_guests_and_the_disk_goes_on() {
    for error in [libc::ENOSPC, libc::EIO] {
        let (_worker, mut driver, notified) = worker(Fake { result: -error, ..Fake::default() });
        for (kind, readable, writable) in [
            (1, &[(HEADER, 16), (DATA, 512)][..], &[(STATUS, 1)][..]),
            (0, &[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]),
            (4, &[(HEADER, 16)], &[(STATUS, 1)]),
        ] {
            write_header(&driver, kind, 0);
            driver.add(readable, writable);
            driver.kick();
            assert_eq!(driver.used().unwrap().1, 1);
            assert_eq!(driver.ram.memory().read_obj::<u8>(GuestAddress(STATUS)).unwrap(), IOERR);
        }
        assert!(notified.faults().is_empty());
    }
}

#[test]
fn what_the_kernel_refuses_is_an_error_for_the_guest_alone() {
    for plain in [false, true] {
        let (folder, path) = image(SECTORS);
        let opened = Image { file: std::fs::File::open(&path).unwrap(), ..backend(&path).open().unwrap() };
        let block = Block { plain, ..Block::new(&describe(&config(false)), opened).unwrap() };
        let mut machine = on(block, path, folder);
        assert_eq!(machine.offer(1, 0, &[(DATA, 512)], &[]), (IOERR, 1), "the file is open for reading alone");
        assert_eq!(machine.offer(0, 0, &[], &[(DATA, 512)]), (OK, 513));
    }
}

#[test]
fn a_driver_has_no_more_requests_under_way_than_its_queue_has_places() {
    let most = Arc::new(AtomicUsize::new(0));
    let may_end = Arc::new(AtomicBool::new(false));
    let fake = Fake { may_end: Arc::clone(&may_end), most: Arc::clone(&most), ..Fake::default() };
    let event = fake.event.try_clone().unwrap();
    let (worker, mut driver, notified) = worker(fake);
    write_header(&driver, 4, 0);
    let head = driver.add(&[(HEADER, 16)], &[(STATUS, 1)]);
    // One entry after the other, as fast as the device takes them: more than the ring has places at a time is a fault.
    let mut offered = 1;
    while offered < 400 && notified.faults().is_empty() {
        let ring = driver.queue.state();
        if offered < ring.next_avail + 100 {
            driver.offer(head);
            offered += 1;
        } else if most.load(Ordering::SeqCst) >= 256 {
            break;
        }
        driver.kick();
    }
    may_end.store(true, Ordering::SeqCst);
    event.write(1).unwrap();
    worker.pause(Instant::now() + LIMIT).unwrap();
    assert_eq!(most.load(Ordering::SeqCst), 256);
    assert_eq!(notified.faults(), [""; 0]);
}

#[test]
fn a_request_that_does_not_end_keeps_the_others_from_nothing_and_is_answered_once() {
    let may_end = Arc::new(AtomicBool::new(false));
    let most = Arc::new(AtomicUsize::new(0));
    let fake = Fake { may_end: Arc::clone(&may_end), result: 512, most: Arc::clone(&most), ..Fake::default() };
    let event = fake.event.try_clone().unwrap();
    let (worker, mut driver, notified) = worker(fake);
    write_header(&driver, 1, 0);
    let written = driver.add(&[(HEADER, 16), (DATA, 512)], &[(STATUS, 1)]);
    driver.kick();
    let deadline = Instant::now() + LIMIT;
    while most.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline, "the write does not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..3 {
        assert!(
            worker.pause(Instant::now() + Duration::from_millis(50)).is_err(),
            "it is at rest with a write under way"
        );
        worker.resume();
        write_header(&driver, 0, 1);
        let read = driver.add(&[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
        driver.kick();
        assert_eq!(driver.used().unwrap().0, u32::from(read), "a read behind the write that hangs");
    }
    // Told to rest while it hangs, it does once that has ended.
    worker.begin_pause();
    may_end.store(true, Ordering::SeqCst);
    event.write(1).unwrap();
    worker.pause(Instant::now() + LIMIT).unwrap();
    assert_eq!(driver.try_used().map(|used| used.0), Some(u32::from(written)));
    assert_eq!(driver.try_used(), None);
    assert_eq!(notified.faults(), [""; 0]);
}

#[test]
fn what_a_migration_was_told_cannot_last_the_guest_is_told_at_its_next_flush() {
    let (folder, path) = image(SECTORS);
    let opened = backend(&path).open().unwrap();
    opened.spoil();
    let mut machine = on(Block::new(&describe(&config(false)), opened).unwrap(), path, folder);
    assert_eq!(machine.offer(4, 0, &[], &[]), (IOERR, 1));
    assert_eq!(machine.offer(4, 0, &[], &[]), (OK, 1), "once");
}
