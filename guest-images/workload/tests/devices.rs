//! The image's drivers with stock QEMU's devices.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]
#![allow(clippy::expect_used, reason = "as above")]

mod guest;

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use guest::Guest;
use workload_guest::block::{self, BLOCK, Content};
use workload_guest::command::Case;
use workload_guest::device_report::{Balloon, Devices, DiskDone, Free, Hostile, NetDone};
use workload_guest::frame::{self, Frame, Sequence};
use workload_guest::{Command, Line};

const MIB: u64 = 1 << 20;

/// Waits for a line of this kind.
macro_rules! answer {
    ($guest:expr, $kind:ident) => {
        $guest.wait(|line| if let Line::$kind(answer) = line { Some(answer) } else { None })
    };
}

/// A disk of 16 MiB, and QEMU's options for it.
fn disk() -> (tempfile::NamedTempFile, [String; 4]) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 * MIB).unwrap();
    let drive = format!("file={},format=raw,if=none,id=disk,discard=unmap,cache=writeback", file.path().display());
    let device = "virtio-blk-pci,drive=disk,disable-legacy=on".to_owned();
    (file, ["-drive".to_owned(), drive, "-device".to_owned(), device])
}

fn with_disk(options: &str) -> Option<(Guest, tempfile::NamedTempFile)> {
    let (file, arguments) = disk();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let guest = Guest::boot_with(&format!("working-set=4096,rate=1,disk=8MiB{options}"), 64, 1, &arguments)?;
    guest.ready();
    Some((guest, file))
}

fn run(guest: &mut Guest, command: &str) -> DiskDone {
    guest.send(command.parse().unwrap());
    answer!(guest, DiskDone)
}

#[test]
fn blocks_are_written_and_found() {
    for options in ["", ",interrupts=on"] {
        let Some((mut guest, file)) = with_disk(options) else { return };
        let found: Devices = answer!(guest, Devices);
        assert_eq!((found.disk_blocks, found.disk_used), (16 * MIB / BLOCK, 8 * MIB / BLOCK));
        let blocks = found.disk_used;

        let written = run(&mut guest, "disk write sequential 65536 4 once");
        assert_eq!((written.bytes, written.errors), (8 * MIB, 0));
        let flushed = run(&mut guest, "disk-flush");
        assert_eq!((flushed.requests, flushed.errors), (1, 0));
        for number in 0..blocks {
            assert!(matches!(content(&file, number), Content::Generation(1..=128)), "block {number}");
        }
        let mixed = run(&mut guest, "disk mixed random 8192 32 300");
        assert_eq!((mixed.errors, mixed.bad, mixed.repeated), (0, 0, 0), "{mixed:?}");
        assert_eq!(mixed.interrupts > 0, !options.is_empty(), "{mixed:?}");

        assert_eq!(run(&mut guest, "disk-zero 3 4").errors, 0);
        assert_eq!(content(&file, 6), Content::Zeros);
        let read = run(&mut guest, "disk read sequential 1048576 2 once");
        assert_eq!((read.bytes, read.bad, read.known), (8 * MIB, 0, blocks));

        // A block that is elsewhere, and one that is stale.
        let mut bytes = vec![0; BLOCK as usize];
        file.as_file().read_exact_at(&mut bytes, 100 * BLOCK).unwrap();
        run(&mut guest, "disk write random 4096 1 1");
        run(&mut guest, "disk write sequential 4096 8 once stamp");
        file.as_file().write_all_at(&bytes, 100 * BLOCK).unwrap();
        file.as_file().write_all_at(&bytes, 200 * BLOCK).unwrap();
        guest.send("disk read sequential 4096 32 once".parse().unwrap());
        // Told with a report, before or after the job's end.
        let (mut told, mut done) = (Vec::new(), None);
        while told.len() < 2 || done.is_none() {
            match guest.line().unwrap() {
                Line::BadBlock(bad) => told.push((bad.block, bad.word)),
                Line::DiskDone(read) => done = Some((read.bad, read.known)),
                _ => {}
            }
        }
        assert_eq!((told, done), (vec![(100, block::WORDS as u32), (200, 0)], Some((2, blocks - 2))));
        guest.send(Command::Off);
        guest.ends();
    }
}

fn content(file: &tempfile::NamedTempFile, number: u64) -> Content {
    let mut bytes = vec![0; BLOCK as usize];
    file.as_file().read_exact_at(&mut bytes, number * BLOCK).unwrap();
    let words: Vec<_> = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    block::read(number, 1, |index| words[index])
}

#[test]
fn a_hostile_driver_is_bad_and_the_disk_works_again() {
    let Some((mut guest, _file)) = with_disk("") else { return };
    for (name, case) in Case::ALL {
        guest.send(Command::Hostile(case));
        let hostile: Hostile = answer!(guest, Hostile);
        assert_eq!(hostile.works, 1, "{name}: {hostile:?}");
        // QEMU reads what is nowhere, and says that it did.
        let is_harmless = matches!(case, Case::Outside | Case::Wraps);
        assert!(is_harmless || hostile.status & 0x40 != 0, "{name}: {hostile:?}");
    }
    let read = run(&mut guest, "disk read sequential 65536 4 once");
    assert_eq!((read.bytes, read.errors), (8 * MIB, 0));
    guest.send(Command::Off);
    guest.ends();
}

#[test]
fn free_pages_go_and_come_back_as_zeros() {
    let more = ["-device", "virtio-balloon-pci,disable-legacy=on,free-page-reporting=on"];
    let rng = ["-device", "virtio-rng-pci,disable-legacy=on"];
    let options = "working-set=4096,rate=1,free=8MiB,random=on";
    let Some(mut guest) = Guest::boot_with(options, 64, 1, &[more, rng].concat()) else { return };
    guest.ready();
    let found = answer!(guest, Devices);
    assert_eq!((found.balloon, found.random, found.free.bytes()), (2, 1, 8 * MIB));
    let mut ask = |command| {
        guest.send(command);
        let Free { pages, zeros, kept, errors, .. } = answer!(guest, Free);
        (pages, zeros, kept, errors)
    };
    assert_eq!(ask(Command::FreeFill), (2048, 0, 2048, 0));
    assert_eq!(ask(Command::FreeCheck), (2048, 0, 2048, 0));
    assert_eq!(ask(Command::FreeReport), (2048, 0, 0, 0));
    assert_eq!(ask(Command::FreeCheck), (2048, 2048, 0, 0));
    assert_eq!(ask(Command::FreeFill), (2048, 0, 2048, 0));

    let balloon = |guest: &mut Guest, pages| -> Balloon {
        guest.send(Command::Balloon(pages));
        answer!(guest, Balloon)
    };
    assert_eq!(balloon(&mut guest, 1500).pages, 1500);
    assert_eq!(balloon(&mut guest, 0).pages, 0);
    guest.send(Command::FreeCheck);
    let Free { zeros, kept, .. } = answer!(guest, Free);
    assert_eq!((zeros, kept), (1500, 548));

    guest.send(Command::Random(10_000));
    let random = answer!(guest, Random);
    assert_eq!(random.bytes, 10_000);
    assert!((38_000..42_000).contains(&random.ones), "{random:?}");
    guest.send(Command::Off);
    guest.ends();
}

/// QEMU's network back-end that needs no rights: a datagram is a frame.
struct Wire {
    socket: UnixDatagram,
    _folder: tempfile::TempDir,
}

fn with_wire(options: &str) -> Option<(Guest, Wire)> {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    let socket = UnixDatagram::bind(&ours).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let backend = format!(
        "dgram,id=net,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        theirs.display(),
        ours.display()
    );
    let device = "virtio-net-pci,netdev=net,disable-legacy=on,mac=52:54:00:12:34:56";
    let options = format!("working-set=4096,rate=1,net=on{options}");
    let guest = Guest::boot_with(&options, 64, 1, &["-netdev", &backend, "-device", device])?;
    guest.ready();
    let found = answer!(guest, Devices);
    assert_eq!(found.net_mac, 0x5254_0012_3456);
    socket.connect(&theirs).unwrap();
    Some((guest, Wire { socket, _folder: folder }))
}

fn outgoing(sequence: u64, length: usize) -> Vec<u8> {
    let mut frame = vec![sequence as u8; length];
    let sum = frame::sum(&frame[frame::HEAD..]);
    frame::seal(&mut frame, [0xff; 6], [2, 0, 0, 0, 0, 1], sequence, sum);
    frame
}

#[test]
fn frames_are_sent_checked_and_sent_back() {
    for options in ["", ",interrupts=on"] {
        let Some((mut guest, wire)) = with_wire(options) else { return };
        let mut buffer = [0; 2048];
        for length in [60, 61, 1514] {
            guest.send(format!("net-send {length} once").parse().unwrap());
            let mut came = Sequence::default();
            for _ in 0..256 {
                let got = wire.socket.recv(&mut buffer).unwrap();
                assert_eq!(got, length);
                match frame::read(&buffer[..got]) {
                    Frame::Ours { sequence, echoed: false } => came.take(sequence),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!((came.lost, came.duplicate), (0, 0));
            let done: NetDone = answer!(guest, NetDone);
            assert_eq!(done.sent, 256);
        }

        guest.send("net-echo forever".parse().unwrap());
        for sequence in 10..110 {
            let frame = outgoing(sequence, 64 + sequence as usize);
            wire.socket.send(&frame).unwrap();
            let got = wire.socket.recv(&mut buffer).unwrap();
            assert_eq!(frame::read(&buffer[..got]), Frame::Ours { sequence, echoed: true });
        }
        let mut bad = outgoing(110, 100);
        bad[50] ^= 1;
        for frame in [bad, outgoing(112, 100), outgoing(112, 100), vec![0; 60]] {
            wire.socket.send(&frame).unwrap();
        }
        std::thread::sleep(Duration::from_millis(200));
        guest.send(Command::NetStop);
        let done: NetDone = answer!(guest, NetDone);
        assert_eq!((done.received, done.lost, done.duplicate, done.corrupt), (102, 2, 1, 1), "{done:?}");
        assert_eq!(done.interrupts > 0, !options.is_empty(), "{done:?}");
        guest.send(Command::Off);
        guest.ends();
    }
}

#[test]
fn what_is_missing_is_told() {
    for (options, part) in [("disk=1MiB", "no Block device"), ("net=on", "no Net device"), ("free=4KiB", "no Balloon")]
    {
        let Some(guest) = Guest::boot(options, 64, 1) else { return };
        let message = guest.wait(|line| if let Line::Error(error) = line { Some(error.message) } else { None });
        assert!(message.contains(part), "{message}");
        guest.ends();
    }
    let Some((mut guest, _file)) = with_disk("") else { return };
    guest.send(Command::Random(1));
    guest.wait(|line| matches!(line, Line::Error(_)).then_some(()));
    guest.send(Command::Off);
    guest.ends();
}
