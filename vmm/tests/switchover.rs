//! A switchover that does not come about, between a machine without KVM and a destination played by the test: the guest does not
//! stand for a network or a destination that has failed.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use support::Fake;
use thermocline::migration::SourceMachine;
use thermocline::migration::cancel::Cancel;
use thermocline::migration::link::Link;
use thermocline::migration::progress::Progress;
use thermocline::migration::source::{self, Options, SourceError};
use thermocline::migration::wire::message::{Incoming, receive, receive_message};
use thermocline::migration::wire::{Accepted, FrameReader, FrameWriter, Message, WireError, preamble};

/// A destination that takes everything up to the machine's state.
fn take_all(link: &UnixStream) -> (FrameReader<UnixStream>, FrameWriter<UnixStream>) {
    let mut reader = FrameReader::new(link.try_clone().unwrap());
    let mut writer = FrameWriter::new(link.try_clone().unwrap());
    preamble::send(writer.link()).unwrap();
    preamble::receive(reader.link()).unwrap();
    let mut payload = Vec::new();
    loop {
        match receive(&mut reader, &mut payload, u64::MAX).unwrap() {
            Incoming::Message(Message::Offer(_)) => {
                Message::Accept(Accepted { can_page_out: false }).send(&mut writer).unwrap();
            }
            Incoming::Message(Message::RoundEnd(round)) => Message::RoundDone(round).send(&mut writer).unwrap(),
            Incoming::Message(Message::State(_)) => return (reader, writer),
            _ => {}
        }
    }
}

/// Migrates to a destination that does `then` once it has everything.
fn migrate(then: impl FnOnce(&Fake, FrameReader<UnixStream>, FrameWriter<UnixStream>) + Send) -> SourceError {
    let source = Fake::new();
    SourceMachine::resume(&source);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let error = thread::scope(|scope| {
        let source = &source;
        scope.spawn(move || {
            let (reader, writer) = take_all(&theirs);
            then(source, reader, writer);
        });
        let (options, cancel) = (Options::default(), Cancel::default());
        let link = Link::try_from(ours).unwrap();
        source::migrate(source, link, &options, None, &cancel, &mut |_: &Progress| {}).unwrap_err()
    });
    assert!(source.runs(), "{error}");
    error
}

#[test]
fn the_guest_goes_on_before_the_destination_hears_so() {
    let error = migrate(|source, mut reader, mut writer| {
        assert!(!source.runs());
        writer.link().write_all(&[0; 24]).unwrap();
        match receive_message(&mut reader, "abort").unwrap() {
            Message::Abort(_) => assert!(source.runs(), "the guest was paused while the destination was told"),
            other => panic!("{}", other.name()),
        }
    });
    assert!(matches!(error, SourceError::Wire(WireError::Header { .. })), "{error}");
}

#[test]
fn the_guest_does_not_stand_for_a_destination_that_is_silent() {
    const NOT_FOR: Duration = Duration::from_secs(20);
    let error = migrate(|source, mut reader, _writer| {
        let since = Instant::now();
        while !source.runs() {
            assert!(since.elapsed() < NOT_FOR, "the guest is paused");
            thread::sleep(Duration::from_millis(10));
        }
        assert!(matches!(receive_message(&mut reader, "abort").unwrap(), Message::Abort(_)));
    });
    assert!(matches!(error, SourceError::Wire(WireError::Silent)), "{error}");
}

/// It has been told that the guest is its own, and says nothing: the guest is paused until somebody has looked, and the source does
/// not wait for that as long as for silence.
#[test]
fn a_destination_that_does_not_say_that_the_guest_runs_is_not_waited_for_long() {
    const AT_MOST: Duration = Duration::from_secs(20);
    let source = Fake::new();
    SourceMachine::resume(&source);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (committed, has_committed) = std::sync::mpsc::channel();
    let error = thread::scope(|scope| {
        scope.spawn(move || {
            let (mut reader, mut writer) = take_all(&theirs);
            Message::Ready.send(&mut writer).unwrap();
            assert!(matches!(receive_message(&mut reader, "commit").unwrap(), Message::Commit));
            committed.send(Instant::now()).unwrap();
            // Nothing more comes, and it is no news that the guest stays.
            assert!(matches!(receive_message(&mut reader, "nothing"), Err(WireError::Closed)));
        });
        let (options, cancel) = (Options::default(), Cancel::default());
        let link = Link::try_from(ours).unwrap();
        source::migrate(&source, link, &options, None, &cancel, &mut |_: &Progress| {}).unwrap_err()
    });
    assert!(matches!(error, SourceError::Unconfirmed(WireError::Silent)), "{error}");
    assert!(!source.runs(), "it may run there");
    assert!(has_committed.recv().unwrap().elapsed() < AT_MOST);
}

/// Whoever gave the order may keep what cancels it: the other side sees the end of a migration that has failed all the same.
#[test]
fn a_migration_that_has_failed_leaves_no_connection() {
    let source = Fake::new();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
    let cancel = Cancel::default();
    let link = Link::try_from(ours).unwrap();
    source::migrate(&source, link, &Options::default(), None, &cancel, &mut |_: &Progress| {}).unwrap_err();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut said = Vec::new();
    let end = theirs.read_to_end(&mut said).map_err(|e| e.kind());
    // An end, or that there was more to read for the other side.
    assert!(matches!(end, Ok(_) | Err(std::io::ErrorKind::ConnectionReset)), "{end:?}");
    drop(cancel);
}
