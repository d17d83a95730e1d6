//! Disks whose host fails, or takes its time.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::engine::{Ended, Operation};
use super::*;

/// Does nothing, and says of each operation what it was told to; when it is waited for, if it is slow.
#[derive(Debug, Default)]
struct Fake {
    result: i32,
    is_slow: bool,
    most: Arc<AtomicUsize>,
    flying: Vec<Ended>,
    ended: Vec<Ended>,
}

impl Engine for Fake {
    fn begin(&mut self, number: u64, operation: Operation) -> io::Result<()> {
        let operations = if self.is_slow { &mut self.flying } else { &mut self.ended };
        operations.push((number, operation, self.result));
        self.most.fetch_max(self.flying(), Ordering::SeqCst);
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn has_ended(&mut self) -> bool {
        !self.ended.is_empty()
    }

    fn ended(&mut self) -> Option<Ended> {
        self.ended.pop()
    }

    fn flying(&self) -> usize {
        self.flying.len() + self.ended.len()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.ended.append(&mut self.flying);
        Ok(())
    }

    fn event(&self) -> Option<RawFd> {
        None
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
    let (worker, mut driver, notified) = worker(Fake { is_slow: true, most: Arc::clone(&most), ..Fake::default() });
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
    worker.pause(Instant::now() + LIMIT).unwrap();
    assert_eq!(most.load(Ordering::SeqCst), 256);
    assert_eq!(notified.faults(), [""; 0]);
}
