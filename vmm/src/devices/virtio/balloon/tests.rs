//! A balloon with a driver that is right, and with some that are not.

use std::time::Instant;

use memory_agent::{ByteSize, Counts};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::testing::{Driver, LIMIT, Notified, activation};
use super::*;
use crate::ram::{GuestRam, RamPage};

const RAM: u64 = 4 << 20;
const PAGES: u64 = RAM / PAGE;
/// Where page numbers and statistics lie; rings are below.
const BUFFER: u64 = 0x10_0000;
/// Memory that a guest may give back.
const SPARE: u64 = 0x20_0000;

struct Machine {
    balloon: Balloon,
    drivers: Vec<Driver>,
    notified: Arc<Notified>,
}

fn balloon(config: BalloonConfig) -> Balloon {
    let description = DeviceDescription {
        id: "balloon0".try_into().unwrap(),
        kind: "virtio-balloon".try_into().unwrap(),
        version: 1,
        features: 0,
        config: Vec::new(),
    };
    Balloon::new(&description.with_config(&config).unwrap()).unwrap()
}

fn machine() -> Machine {
    let balloon = balloon(BalloonConfig::default());
    let ram = Arc::new(GuestRam::new(RAM).unwrap());
    let drivers: Vec<_> = (0..4).map(|n| Driver::new(&ram, n, 128, u64::from(n) * 0x4000)).collect();
    let (activation, notified) = activation(&drivers.iter().collect::<Vec<_>>(), balloon.features());
    balloon.activate(activation).unwrap();
    balloon.resume();
    Machine { balloon, drivers, notified }
}

impl Machine {
    fn ram(&self) -> &GuestRam {
        &self.drivers[0].ram
    }

    fn send(&mut self, queue: usize, readable: &[(u64, u32)], writable: &[(u64, u32)]) {
        self.drivers[queue].add(readable, writable);
        self.drivers[queue].kick();
    }

    fn fill(&self) {
        self.ram().memory().write_slice(&vec![0xa5; (RAM - SPARE) as usize], GuestAddress(SPARE)).unwrap();
        self.ram().take_own_writes();
    }

    fn spare(&self) -> Counts {
        self.ram().residency(RamPage(SPARE / PAGE)..RamPage(PAGES)).unwrap().counts()
    }
}

#[test]
fn a_page_in_the_balloon_is_a_hole_and_of_zeros_when_it_comes_back() {
    let mut machine = machine();
    machine.fill();
    let first = (SPARE / PAGE) as u32;
    for (n, number) in [first + 7, first + 3, first + 4, first + 7].iter().enumerate() {
        machine.ram().memory().write_obj(*number, GuestAddress(BUFFER + 4 * n as u64)).unwrap();
    }
    machine.ram().take_own_writes();
    machine.send(0, &[(BUFFER, 16)], &[]);
    assert!(machine.drivers[0].used().is_some());
    assert_eq!(machine.spare().hole, 3);
    assert_eq!(machine.balloon.status().given_back, ByteSize(3 * PAGE));
    let written: Vec<_> = machine.ram().take_own_writes().runs().collect();
    let spare = RamPage(SPARE / PAGE);
    assert!(written.contains(&(spare + 3..spare + 5)) && written.contains(&(spare + 7..spare + 8)), "{written:?}");
    assert_eq!(machine.ram().memory().read_obj::<u64>(GuestAddress(SPARE + 3 * PAGE)).unwrap(), 0);
    machine.send(1, &[(BUFFER, 16)], &[]);
    assert!(machine.drivers[1].used().is_some());
}

#[test]
fn what_is_reported_free_is_a_hole_unless_the_guest_relies_on_what_is_in_it() {
    let mut machine = machine();
    machine.fill();
    machine.balloon.write_config(POISON_AT, &0xaa_u32.to_le_bytes());
    machine.send(3, &[], &[(SPARE, 0x8_0000)]);
    assert!(machine.drivers[3].used().is_some());
    assert_eq!(machine.spare().hole, 0);
    machine.balloon.write_config(POISON_AT, &0_u32.to_le_bytes());
    machine.send(3, &[], &[(SPARE, 0x8_0000), (SPARE + 0x10_0001, 0x2fff)]);
    assert!(machine.drivers[3].used().is_some());
    assert_eq!(machine.spare().hole, 0x80 + 2, "and whole pages alone");
    assert!(machine.notified.faults().is_empty());
}

#[test]
fn a_target_is_told_and_what_the_guest_says_is_heard() {
    let machine = machine();
    machine.balloon.set_target(ByteSize::mib(1));
    assert_eq!(machine.notified.configs.load(Ordering::SeqCst), 1);
    let mut pages = [0; 4];
    machine.balloon.read_config(0, &mut pages);
    assert_eq!(u32::from_le_bytes(pages), 256);
    machine.balloon.write_config(ACTUAL_AT, &99_u32.to_le_bytes());
    let status = machine.balloon.status();
    assert_eq!((status.target, status.actual, status.stats), (ByteSize::mib(1), ByteSize(99 * PAGE), None));
}

#[test]
fn statistics_are_asked_for_and_waited_for() {
    let mut machine = machine();
    let write = |machine: &Machine, free: u64| {
        let bytes = [&4_u16.to_le_bytes()[..], &free.to_le_bytes()].concat();
        machine.ram().memory().write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
    };
    write(&machine, 11);
    machine.send(2, &[(BUFFER, 10)], &[]);
    let deadline = Instant::now() + LIMIT;
    while machine.balloon.statistics.held().is_none() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(machine.drivers[2].try_used(), None, "the device keeps the buffer");
    let stats = std::thread::scope(|scope| {
        let asked = scope.spawn(|| machine.balloon.statistics.ask(LIMIT));
        assert!(machine.drivers[2].used().is_some(), "it is given back when somebody asks");
        let bytes = [&4_u16.to_le_bytes()[..], &22_u64.to_le_bytes()].concat();
        machine.drivers[2].ram.memory().write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
        machine.drivers[2].add(&[(BUFFER, 10)], &[]);
        machine.drivers[2].kick();
        asked.join().unwrap()
    });
    assert_eq!(stats.and_then(|stats| stats.free_memory), Some(22));
    assert!(machine.balloon.statistics.held().is_some());
}

#[test]
fn what_is_saved_is_there_again() {
    let machine = machine();
    machine.balloon.set_target(ByteSize::mib(2));
    machine.balloon.write_config(ACTUAL_AT, &5_u32.to_le_bytes());
    machine.balloon.pause(Instant::now() + LIMIT).unwrap();
    let other = balloon(BalloonConfig::default());
    other.restore(&machine.balloon.save()).unwrap();
    assert_eq!(other.save(), machine.balloon.save());
    assert_eq!(other.config_space(), machine.balloon.config_space());
    assert!(other.restore(&[1; 99]).is_err());
}

#[test]
fn only_what_is_offered_can_be_had() {
    let plain = balloon(BalloonConfig { free_page_reporting: false, deflate_on_oom: false });
    assert_eq!(plain.features(), 1 << F_STATS_VQ);
}

#[test]
fn page_numbers_that_are_none_end_in_a_fault_and_pages_out_of_ram_in_nothing() {
    let mut machine = machine();
    machine.ram().memory().write_obj(u32::MAX, GuestAddress(BUFFER)).unwrap();
    machine.send(0, &[(BUFFER, 4)], &[]);
    assert!(machine.drivers[0].used().is_some());
    machine.send(0, &[(BUFFER, 6)], &[]);
    assert!(machine.notified.fault().unwrap().contains("page numbers"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn nothing_that_a_guest_offers_does_harm(
        raw in prop::collection::vec((0..4_usize, 0..RAM + 9999, 0..70_000_u32, 0..4_u16, 0..9_u16), 1..12)) {
        let mut machine = machine();
        for (queue, address, length, flags, next) in raw {
            machine.drivers[queue].write_descriptor(next % 8, (address, length, flags, next));
            machine.drivers[queue].offer(next % 8);
            machine.drivers[queue].kick();
        }
        machine.balloon.pause(Instant::now() + LIMIT).unwrap();
        machine.balloon.deactivate();
    }
}
