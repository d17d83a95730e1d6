//! An interface with a driver that is right, with some that are not, and with taps of the host.

mod frames;
mod real_tap;

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::testing::{Driver, LIMIT, Notified, activation};
use super::features::{CTRL_GUEST_OFFLOADS, CTRL_VQ, GUEST_ANNOUNCE, GUEST_CSUM, GUEST_TSO4, MQ, MRG_RXBUF};
use super::tap::HEADER;
use super::*;
use crate::ram::GuestRam;

const RAM: u64 = 4 << 20;
/// Behind the rings.
const BUFFERS: u64 = 0x10_0000;

fn config(pairs: u16) -> NetConfig {
    NetConfig { mac: [2, 0, 0, 0, 0, 7].into(), mtu: 1500, pairs, udp_segmentation: true }
}

fn description(config: &NetConfig) -> DeviceDescription {
    let (id, kind) = ("net0".try_into().unwrap(), KIND.try_into().unwrap());
    DeviceDescription { id, kind, version: 1, features: 0, config: Vec::new() }.with_config(config).unwrap()
}

/// An interface at work, and the driver's side of its queues.
struct Machine {
    net: VirtioNet,
    ram: Arc<GuestRam>,
    queues: Vec<Driver>,
    notified: Arc<Notified>,
}

impl Machine {
    fn with_tap(tap: Tap, pairs: u16, features: &[u32]) -> Self {
        let machine = Self::at_rest(tap, pairs, features);
        machine.net.resume();
        machine
    }

    fn at_rest(tap: Tap, pairs: u16, features: &[u32]) -> Self {
        Self::of(VirtioNet::new(&description(&config(pairs)), &Arc::new(tap).into()).unwrap(), pairs, features)
    }

    /// One that has come from elsewhere, where it has saved this. It is at rest.
    fn migrated(tap: Tap, pairs: u16, features: &[u32], saved: &[u8]) -> Self {
        let net = VirtioNet::new(&description(&config(pairs)), &Arc::new(tap).into()).unwrap();
        net.restore(saved).unwrap();
        Self::of(net, pairs, features)
    }

    fn of(net: VirtioNet, pairs: u16, features: &[u32]) -> Self {
        let ram = Arc::new(GuestRam::new(RAM).unwrap());
        let queue = |number: u16| Driver::new(&ram, number, QUEUE_SIZE, u64::from(number) * 0x4000);
        let queues: Vec<Driver> = (0..2 * pairs + 1).map(queue).collect();
        let bits = features.iter().fold(0, |bits, feature| bits | 1 << feature);
        let (activation, notified) = activation(&queues.iter().collect::<Vec<_>>(), bits);
        net.activate(activation).unwrap();
        Self { net, ram, queues, notified }
    }

    /// One whose tap is a pair of sockets, which keep frames apart as a tap does; and the other one.
    fn with_socket(features: &[u32]) -> (Self, UnixDatagram) {
        let (tap, peer) = socket();
        (Self::with_tap(tap, 1, features), peer)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Offers a buffer for what arrives.
    fn offer_buffer(&mut self, at: u64, length: u32) {
        self.queues[0].add(&[], &[(at, length)]);
        self.queues[0].kick();
    }

    /// Gives the device a command; its answer.
    fn command(&mut self, queue: usize, command: &[u8]) -> u8 {
        self.write(BUFFERS, command);
        self.write(BUFFERS + 0x100, &[0x55]);
        self.queues[queue].add(&[(BUFFERS, command.len() as u32)], &[(BUFFERS + 0x100, 1)]);
        self.queues[queue].kick();
        assert_eq!(self.queues[queue].used().map(|(_, written)| written), Some(1));
        self.read(BUFFERS + 0x100, 1)[0]
    }

    /// How often the driver has been told that the configuration has changed.
    fn configs(&self) -> u32 {
        self.notified.configs.load(std::sync::atomic::Ordering::SeqCst)
    }

    fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    }
}

fn socket() -> (Tap, UnixDatagram) {
    let (ours, peer) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    (Tap::of_descriptors(vec![ours.into()]), peer)
}

/// A frame with its header, of bytes that tell where they belong.
fn frame(length: usize, seed: u8) -> Vec<u8> {
    let body = (0..length).map(|n| (n as u8).wrapping_mul(31).wrapping_add((n >> 8) as u8) ^ seed);
    [0; HEADER].into_iter().chain(body).collect()
}

#[test]
fn the_guest_sees_what_is_described() {
    let (machine, _peer) = Machine::with_socket(&[]);
    let mut space = [0xff; 16];
    machine.net.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xdc, 5, 0, 0, 0, 0]);
    assert_eq!((machine.net.device_type(), machine.net.queue_sizes()), (1, &[256; 3][..]));
}

#[test]
fn what_makes_no_sense_or_what_the_tap_has_not_is_refused() {
    let refused = |config: &NetConfig| {
        let (tap, _peer) = socket();
        VirtioNet::new(&description(config), &Arc::new(tap).into()).unwrap_err().to_string()
    };
    assert!(refused(&NetConfig { mac: [1; 6].into(), ..config(1) }).contains("multicast"));
    assert!(refused(&NetConfig { mtu: 9000, ..config(1) }).contains("ip link set test mtu 9000"));
    assert!(refused(&config(2)).contains("queues=2"));

    let refused = |mac: Option<[u8; 6]>, mtu| {
        let (tap, _peer) = socket();
        let backend = NetBackend { tap: Arc::new(tap), mac: mac.map(MacAddress::from), mtu };
        VirtioNet::new(&description(&config(1)), &backend).map(drop).map_err(|e| e.to_string())
    };
    assert_eq!(refused(Some([2, 0, 0, 0, 0, 7]), Some(1500)), Ok(()));
    assert!(refused(Some([2, 0, 0, 0, 0, 8]), None).unwrap_err().contains("say mac=02:00:00:00:00:07"));
    assert!(refused(None, Some(1400)).unwrap_err().contains("say mtu=1500"));
}

#[test]
fn commands_are_answered_and_those_that_were_not_offered_refused() {
    let (mut machine, _peer) = Machine::with_socket(&[CTRL_VQ, CTRL_GUEST_OFFLOADS, GUEST_CSUM, GUEST_TSO4]);
    let offloads = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    for (command, answer) in [
        (offloads(1 << GUEST_CSUM), 0),
        (offloads(0), 0),
        (offloads(1 << 8), 1),
        (offloads(0)[..9].to_vec(), 1),
        ([&offloads(0)[..], &[0]].concat(), 1),
        (vec![4, 0, 1, 0], 1),
        (vec![3, 0], 1),
        (vec![1, 0, 2, 0, 0, 0, 0, 1], 1),
        (vec![0], 1),
        (vec![], 1),
        (vec![9; 4000], 1),
    ] {
        assert_eq!(machine.command(2, &command), answer, "{command:?}");
    }
    assert!(machine.notified.faults().is_empty());
}

#[test]
fn what_the_driver_has_chosen_goes_with_the_guest_and_it_is_announced() {
    let pair = || (socket(), socket());
    let features = [CTRL_VQ, CTRL_GUEST_OFFLOADS, GUEST_CSUM, GUEST_ANNOUNCE, MQ];
    let two = |((first, one), (second, other)): ((Tap, UnixDatagram), (Tap, UnixDatagram))| {
        let queues = [first, second].map(|tap| tap.queue(0).unwrap().try_clone_to_owned().unwrap());
        (Tap::of_descriptors(queues.into()), [one, other])
    };
    let (tap, _peers) = two(pair());
    let mut first = Machine::with_tap(tap, 2, &features);
    assert_eq!(first.command(4, &[4, 0, 2, 0]), 0);
    assert_eq!(first.command(4, &[4, 0, 3, 0]), 1, "there are two");
    assert_eq!(first.command(4, &[4, 0, 0, 0]), 1);
    assert_eq!(first.command(4, &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    first.net.pause(Instant::now() + LIMIT).unwrap();
    let saved = first.net.save();
    assert_eq!(saved, [2, 1, 2, 0], "the bytes that travel");

    let (tap, _peers) = two(pair());
    let second = Machine::migrated(tap, 2, &features, &saved);
    assert_eq!((second.status(), second.configs()), (1, 0), "not before it runs here");
    second.net.resume();
    wait_until(|| second.configs() == 1);
    assert_eq!(second.status(), 3);
    second.net.pause(Instant::now() + LIMIT).unwrap();
    let saved = second.net.save();
    assert_eq!(saved, [2, 1, 2, 1], "asked for and not answered");

    let (tap, _peers) = two(pair());
    let mut third = Machine::migrated(tap, 2, &features, &saved);
    assert_eq!(third.status(), 3, "and so it arrives");
    third.net.resume();
    wait_until(|| third.configs() == 1);
    assert_eq!((third.command(4, &[3, 0]), third.status()), (0, 1));
    wait_until(|| third.configs() == 2);
    assert_eq!(third.status(), 3, "once more");
    third.net.deactivate();
    assert_eq!(third.net.save(), [1, 0, 0], "another driver begins anew");
    assert!(third.net.restore(&[3, 0, 0]).is_err() && third.net.restore(&[1, 0, 2]).is_err());
    assert!(third.net.restore(&[]).is_err());
}

fn wait_until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_guest_that_has_come_is_announced_whatever_its_driver_can_do() {
    for (features, configs) in [
        (&[][..], 0),
        (&[GUEST_ANNOUNCE][..], 0), // Without a queue for the answer.
        (&[GUEST_ANNOUNCE, CTRL_VQ][..], 5),
    ] {
        let (tap, peer) = socket();
        let machine = Machine::migrated(tap, 1, features, &[1, 0, 0]);
        peer.set_nonblocking(true).unwrap();
        let mut bytes = [0; 100];
        std::thread::sleep(Duration::from_millis(20));
        assert!(peer.recv(&mut bytes).is_err(), "not before it runs here");
        peer.set_nonblocking(false).unwrap();
        machine.net.resume();
        let mut at = Vec::new();
        for number in 0..announce::ROUNDS {
            assert_eq!(peer.recv(&mut bytes).unwrap(), HEADER + 60, "{number}");
            assert_eq!(bytes[..HEADER], [0; HEADER]);
            assert_eq!(bytes[HEADER..][..60], announce::frame([2, 0, 0, 0, 0, 7].into()));
            at.push(Instant::now());
            // Neither does a pause end it, nor is one repeated by it.
            machine.net.pause(Instant::now() + LIMIT).unwrap();
            machine.net.resume();
        }
        assert!(at[4] - at[0] >= Duration::from_millis(700), "{at:?}");
        wait_until(|| machine.configs() == configs);
        peer.set_read_timeout(Some(Duration::from_millis(600))).unwrap();
        assert!(peer.recv(&mut bytes).is_err(), "that was the last");
        assert_eq!(machine.configs(), configs);
    }
}

#[test]
fn a_guest_that_has_not_moved_is_not_announced() {
    let (machine, peer) = Machine::with_socket(&[GUEST_ANNOUNCE, CTRL_VQ]);
    machine.net.pause(Instant::now() + LIMIT).unwrap();
    machine.net.save();
    machine.net.resume();
    peer.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(peer.recv(&mut [0; 100]).is_err());
    assert_eq!((machine.configs(), machine.status()), (0, 1));
}

#[test]
fn what_came_before_the_guest_is_dropped() {
    let (tap, peer) = socket();
    for number in 0..5 {
        peer.send(&frame(1000, number)).unwrap();
    }
    let mut machine = Machine::migrated(tap, 1, &[], &[1, 0, 0]);
    peer.send(&frame(100, 7)).unwrap();
    machine.offer_buffer(BUFFERS, 2000);
    machine.net.resume();
    assert_eq!(machine.queues[0].used(), Some((0, HEADER as u32 + 100)));
    let header = machine.read(BUFFERS, HEADER);
    assert_eq!(machine.read(BUFFERS, HEADER + 100)[HEADER..], frame(100, 7)[HEADER..], "{header:?}");
}

#[test]
fn buffers_that_have_not_been_used_are_put_back_when_it_rests() {
    let (mut machine, peer) = Machine::with_socket(&[MRG_RXBUF]);
    for number in 0..4 {
        machine.offer_buffer(BUFFERS + 0x1000 * number, 0x1000);
    }
    peer.send(&frame(5000, 1)).unwrap();
    assert_eq!(machine.queues[0].used(), Some((0, 4096)));
    machine.net.pause(Instant::now() + LIMIT).unwrap();
    assert_eq!((machine.queues[0].queue.state().next_avail, machine.queues[0].queue.state().next_used), (2, 2));
    peer.send(&frame(100, 2)).unwrap();
    machine.net.resume();
    assert_eq!(machine.queues[0].used(), Some((1, 916)));
    assert_eq!(machine.queues[0].used(), Some((2, 112)));
}

#[test]
fn frames_wait_for_a_tap_that_is_full() {
    // A socket has room for some ten.
    let (mut machine, peer) = Machine::with_socket(&[]);
    for number in 0..60_u64 {
        let frame = frame(1000, number as u8);
        machine.write(BUFFERS + number * 0x1000, &frame);
        machine.queues[1].add(&[(BUFFERS + number * 0x1000, frame.len() as u32)], &[]);
    }
    machine.queues[1].kick();
    std::thread::sleep(Duration::from_millis(20));
    let mut bytes = [0; 2000];
    for number in 0..60 {
        let length = peer.recv(&mut bytes).unwrap();
        assert_eq!(bytes[..length], frame(1000, number), "{number}");
        assert!(machine.queues[1].used().is_some());
    }
}

#[test]
fn a_buffer_without_room_for_a_header_is_a_fault() {
    let (mut machine, _peer) = Machine::with_socket(&[]);
    machine.offer_buffer(BUFFERS, 11);
    assert!(machine.notified.fault().unwrap().contains("no room for the header"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn nothing_that_a_guest_offers_does_harm(
        mergeable in any::<bool>(),
        raw in prop::collection::vec((0..3_usize, 0..RAM + 9999, 0..70_000_u32, 0..4_u16, 0..9_u16), 1..12)) {
        let mut features = vec![CTRL_VQ, CTRL_GUEST_OFFLOADS];
        features.extend(mergeable.then_some(MRG_RXBUF));
        let (mut machine, peer) = Machine::with_socket(&features);
        peer.set_nonblocking(true).unwrap();
        for (queue, address, length, flags, next) in raw {
            let _ = peer.send(&frame(usize::from(next) * 500, 0));
            machine.queues[queue].write_descriptor(next % 8, (address, length, flags, next));
            machine.queues[queue].offer(next % 8);
            machine.queues[queue].kick();
            let _ = peer.recv(&mut [0; 2000]);
        }
        machine.net.pause(Instant::now() + LIMIT).unwrap();
    }
}
