//! A console with a driver that is right, and with some that are not.

use std::io::Write;
use std::time::Instant;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::testing::{Driver, LIMIT, Notified, activation};
use super::*;
use crate::ram::GuestRam;

const RAM: u64 = 1 << 20;
const BUFFER: u64 = 0x8_0000;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console(sink: &Sink) -> VirtioConsole {
    let (id, kind) = ("console0".try_into().unwrap(), "virtio-console".try_into().unwrap());
    let description = DeviceDescription { id, kind, version: 1, features: 0, config: Vec::new() };
    VirtioConsole::new(&description, ConsoleOutput::new(sink.clone())).unwrap()
}

fn machine(sink: &Sink) -> (VirtioConsole, [Driver; 2], Arc<Notified>) {
    let console = console(sink);
    let ram = Arc::new(GuestRam::new(RAM).unwrap());
    let drivers = [Driver::new(&ram, 0, 64, 0), Driver::new(&ram, 1, 64, 0x4000)];
    let (activation, notified) = activation(&[&drivers[0], &drivers[1]], 0);
    console.activate(activation).unwrap();
    console.resume();
    (console, drivers, notified)
}

fn text(driver: &Driver, address: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    driver.ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn what_the_guest_writes_goes_out_in_order() {
    let sink = Sink::default();
    let (_console, [_, mut transmit], _) = machine(&sink);
    let long: Vec<u8> = (0..10_000_u32).map(|n| n as u8).collect();
    transmit.ram.memory().write_slice(&long, GuestAddress(BUFFER)).unwrap();
    transmit.add(&[(BUFFER, 9_000), (BUFFER + 9_000, 1_000)], &[]);
    transmit.add(&[(BUFFER, 3)], &[]);
    transmit.kick();
    assert!(transmit.used().is_some() && transmit.used().is_some());
    assert_eq!(*sink.0.lock().unwrap(), [&long[..], &long[..3]].concat());
}

#[test]
fn input_waits_for_buffers_and_never_for_more_than_there_is_room() {
    let (console, [mut receive, _], _) = machine(&Sink::default());
    assert_eq!(console.receive(&[b'x'; 5000]), MOST_INPUT);
    assert_eq!((console.receive(b"y"), console.room()), (0, 0));
    let drained = console.drained().unwrap();
    assert!(drained.read().is_err(), "not before the guest has had it");
    receive.add(&[], &[(BUFFER, 4000)]);
    receive.add(&[], &[(BUFFER + 4000, 200)]);
    receive.kick();
    assert_eq!(receive.used().map(|(_, written)| written), Some(4000));
    assert_eq!(receive.used().map(|(_, written)| written), Some(96));
    assert_eq!(text(&receive, BUFFER + 4000, 97), [&[b'x'; 96][..], &[0]].concat());
    assert!(drained.read().is_ok());
    receive.add(&[], &[(BUFFER, 9)]);
    receive.kick();
    assert_eq!(console.receive(b"later"), 5);
    assert_eq!(receive.used().map(|(_, written)| written), Some(5));
}

#[test]
fn input_that_the_guest_has_not_had_is_saved() {
    let (first, ..) = machine(&Sink::default());
    first.receive(b"abc");
    first.pause(Instant::now() + LIMIT).unwrap();
    let second = console(&Sink::default());
    second.restore(&first.save()).unwrap();
    assert_eq!(second.input.take(9), b"abc");
    let much = SavedConsole { input: vec![0; MOST_INPUT + 1] };
    assert!(second.restore(&postcard::to_stdvec(&much).unwrap()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn nothing_that_a_guest_offers_does_harm(
        raw in prop::collection::vec((0..2_usize, 0..RAM + 9999, 0..70_000_u32, 0..4_u16, 0..9_u16), 1..12)) {
        let (console, mut drivers, _) = machine(&Sink::default());
        for (queue, address, length, flags, next) in raw {
            console.receive(b"some input");
            drivers[queue].write_descriptor(next % 8, (address, length, flags, next));
            drivers[queue].offer(next % 8);
            drivers[queue].kick();
        }
        console.pause(Instant::now() + LIMIT).unwrap();
    }
}
