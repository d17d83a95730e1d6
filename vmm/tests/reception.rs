//! Whoever else connects where a guest is to come in: none of them ends or delays that, over TCP and over a Unix socket.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use memory_agent::ByteSize;
use support::{Fake, Receiving, receive};
use thermocline::migration::SourceMachine;
use thermocline::migration::cancel::Cancel;
use thermocline::migration::destination::DestinationError;
use thermocline::migration::link::{Address, Link, Listener};
use thermocline::migration::plan::ColdPolicy;
use thermocline::migration::progress::Progress;
use thermocline::migration::source::{self, Options, SourceError};
use thermocline::migration::wire::message::receive_message;
use thermocline::migration::wire::{
    FrameReader, FrameWriter, Message, MigrationId, Offer, Refusal, RefusalReason, WireError, preamble,
};

/// How long anybody may take to say who it is, by `docs/protocol.md`.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// What that may take on a busy machine, and far less than silence elsewhere.
const SOON: Duration = Duration::from_secs(10);
/// Not worth speaking of.
const AT_ONCE: Duration = Duration::from_secs(3);

trait Stream: Read + Write + Send {}
impl<S: Read + Write + Send> Stream for S {}

/// A place where a guest is to come in, and every machine that was made for one.
struct Place {
    address: Address,
    receiving: Receiving,
    made: Arc<Mutex<Vec<Weak<Fake>>>>,
    _directory: tempfile::TempDir,
}

impl Place {
    /// One for each kind of connection, that refuses offers with no window.
    fn each(once: bool) -> [Self; 2] {
        ["tcp:127.0.0.1:0", "unix"].map(|kind| {
            let directory = tempfile::tempdir().unwrap();
            let address = match kind {
                "unix" => Address::Unix(directory.path().join("receive")),
                tcp => tcp.parse().unwrap(),
            };
            let listener = Listener::bind(&address).unwrap();
            let address = listener.address().unwrap();
            let made = Arc::new(Mutex::new(Vec::new()));
            let making = Arc::clone(&made);
            let receiving = receive(listener, once, move |offer| {
                if offer.window == ByteSize(0) {
                    return Err(Refusal { reason: RefusalReason::Memory, text: "no room".into() });
                }
                let machine = Arc::new(Fake::new());
                making.lock().unwrap().push(Arc::downgrade(&machine));
                Ok(machine)
            });
            Self { address, receiving, made, _directory: directory }
        })
    }

    /// Somebody connects.
    fn stranger(&self) -> Box<dyn Stream> {
        match &self.address {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).unwrap();
                stream.set_read_timeout(Some(3 * SOON)).unwrap();
                Box::new(stream)
            }
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).unwrap();
                stream.set_read_timeout(Some(3 * SOON)).unwrap();
                Box::new(stream)
            }
        }
    }

    /// A real source comes, and its guest is here at once.
    fn takes_a_guest(&self) {
        let started = Instant::now();
        migrate(&self.address, Options::default().window).unwrap();
        let took = started.elapsed();
        assert!(took < AT_ONCE, "{took:?}, at {}", self.address);
        self.receiving.arrives().unwrap();
    }

    /// A source that offers a machine, is accepted, and does no more than that until it is dropped.
    fn accepted(&self) -> FrameWriter<Link> {
        let (message, writer) = self.offer(ByteSize::mib(1));
        assert!(matches!(message, Message::Accept(_)), "{}", message.name());
        writer
    }

    fn offer(&self, window: ByteSize) -> (Message, FrameWriter<Link>) {
        let mut link = Link::connect(&self.address).unwrap();
        preamble::send(&mut link).unwrap();
        preamble::receive(&mut link).unwrap();
        let mut reader = FrameReader::new(link.try_clone().unwrap());
        let mut writer = FrameWriter::new(link);
        let offer = Offer {
            machine: Fake::new().describe(),
            cold: ColdPolicy::Paced,
            window,
            id: MigrationId::from_bytes([7; 16]),
            post_copy: false,
        };
        Message::Offer(offer).send(&mut writer).unwrap();
        (receive_message(&mut reader, "accept").unwrap(), writer)
    }
}

/// Migrates a machine; the guest runs at the source if that fails.
fn migrate(address: &Address, window: ByteSize) -> Result<(), SourceError> {
    let source = Fake::new();
    (0..100).for_each(|page| source.write(page, page as u8));
    SourceMachine::resume(&source);
    let (options, cancel) = (Options { window, ..Options::default() }, Cancel::default());
    let result =
        source::migrate(&source, Link::connect(address)?, &options, None, &cancel, &mut |_: &Progress| {}).map(drop);
    assert_eq!(source.runs(), result.is_err());
    result
}

/// Reads until the other side has ended the connection; how long that took.
fn wait_for_end(stream: &mut dyn Stream) -> Duration {
    let started = Instant::now();
    let mut bytes = [0; 4096];
    while let Ok(1..) = stream.read(&mut bytes) {}
    started.elapsed()
}

#[test]
fn a_health_check_ends_nothing() {
    for place in Place::each(false) {
        let mut check = place.stranger();
        check.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
        assert!(wait_for_end(&mut *check) < AT_ONCE);
        drop(place.stranger());
        place.takes_a_guest();
    }
}

#[test]
fn who_says_nothing_or_very_slowly_is_dropped() {
    thread::scope(|scope| {
        for place in Place::each(false) {
            scope.spawn(move || {
                let (mut silent, mut slow) = (place.stranger(), place.stranger());
                let silent = scope.spawn(move || wait_for_end(&mut *silent));
                let slow = scope.spawn(move || {
                    let started = Instant::now();
                    // A good beginning, and then a frame that does not end.
                    let mut bytes = Vec::new();
                    preamble::send(&mut bytes).unwrap();
                    Message::Abort("x".repeat(10_000)).send(&mut FrameWriter::new(&mut bytes)).unwrap();
                    for byte in bytes {
                        if slow.write_all(&[byte]).is_err() {
                            break;
                        }
                        thread::sleep(INTRODUCTION / 50);
                    }
                    started.elapsed()
                });
                for took in [silent, slow].map(|stranger| stranger.join().unwrap()) {
                    assert!((INTRODUCTION / 2..SOON).contains(&took), "{took:?}");
                }
                place.takes_a_guest();
            });
        }
    });
}

#[test]
fn who_says_nothing_or_very_slowly_delays_nobody() {
    for place in Place::each(false) {
        let (silent, mut slow) = (place.stranger(), place.stranger());
        slow.write_all(b"THRM").unwrap();
        place.takes_a_guest();
        drop((silent, slow));
    }
}

#[test]
fn forty_strangers_delay_nobody() {
    for place in Place::each(false) {
        let strangers: Vec<_> = (0..40).map(|_| place.stranger()).collect();
        place.takes_a_guest();
        drop(strangers);
    }
}

#[test]
fn who_is_refused_is_followed_by_the_next() {
    for place in Place::each(false) {
        let refused = migrate(&place.address, ByteSize(0)).unwrap_err();
        assert_eq!(refused.refusal(), Some(RefusalReason::Memory), "{refused}");
        place.takes_a_guest();
    }
}

#[test]
fn one_guest_is_on_its_way_and_the_others_are_told_so() {
    for place in Place::each(false) {
        let first = place.accepted();
        for window in [ByteSize::mib(1), ByteSize(0)] {
            let refused = migrate(&place.address, window).unwrap_err();
            assert_eq!(refused.refusal(), Some(RefusalReason::Busy), "{refused}");
            assert!(refused.to_string().contains("another guest is on its way"), "{refused}");
        }
        assert!(place.made.lock().unwrap()[0].strong_count() > 0);
        // It does not come after all: nothing of it is left, and the next may come.
        drop(first);
        let started = Instant::now();
        while place.made.lock().unwrap()[0].strong_count() > 0 {
            assert!(started.elapsed() < SOON, "a machine is left whose guest has not come");
            thread::sleep(Duration::from_millis(10));
        }
        let (message, _again) = place.offer(ByteSize::mib(1));
        assert!(matches!(message, Message::Accept(_)), "{}", message.name());
    }
}

#[test]
fn once_is_once() {
    for place in Place::each(true) {
        drop(place.stranger());
        let error = place.receiving.arrives().unwrap_err();
        assert!(matches!(error, DestinationError::Wire(WireError::Closed | WireError::Io(_))), "{error}");
    }
    for place in Place::each(true) {
        let refused = migrate(&place.address, ByteSize(0)).unwrap_err();
        let error = place.receiving.arrives().unwrap_err();
        assert!(
            matches!(&error, DestinationError::Refused(refusal) if refusal.text == "no room"),
            "{error}, {refused}"
        );
    }
    for place in Place::each(true) {
        // Whoever comes to nothing beside a guest that is on its way does not end it.
        let first = place.accepted();
        drop(place.stranger());
        assert_eq!(migrate(&place.address, ByteSize(0)).unwrap_err().refusal(), Some(RefusalReason::Busy));
        drop(first);
        let error = place.receiving.arrives().unwrap_err();
        assert!(matches!(error, DestinationError::Wire(WireError::Closed | WireError::Io(_))), "{error}");
    }
}
