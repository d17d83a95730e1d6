//! Sockets with a driver that is right, programs of the host, and guests that are neither.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::testing::{Driver, LIMIT, Notified, activation};
use super::connection::BUFFER;
use super::packet::{HEADER, Header, Op, Ports};
use super::*;
use crate::ram::GuestRam;

const CID: u64 = 7;
const RAM: u64 = 4 << 20;
const INTO: u64 = 0x10_0000;
const OUT: u64 = 0x20_0000;
/// Bytes of each buffer for what comes.
const SIZE: u32 = 4096;

fn description(cid: u32) -> DeviceDescription {
    let (id, kind) = ("vsock0".try_into().unwrap(), KIND.try_into().unwrap());
    DeviceDescription { id, kind, version: 1, features: 0, config: Vec::new() }
        .with_config(&VsockConfig { cid })
        .unwrap()
}

/// A device at work, its driver, and where the host's programs are.
struct Machine {
    device: VirtioVsock,
    queues: [Driver; 3],
    notified: Arc<Notified>,
    folder: tempfile::TempDir,
    /// What the guest has taken of each stream.
    taken: u32,
    buffer: u32,
}

impl Machine {
    fn new() -> Self {
        let machine = Self::at_rest();
        machine.device.resume();
        machine
    }

    fn at_rest() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = Arc::new(VsockSocket::bind(&folder.path().join("s")).unwrap());
        let device = VirtioVsock::new(&description(CID as u32), socket).unwrap();
        let ram = Arc::new(GuestRam::new(RAM).unwrap());
        let mut queues = [0, 1, 2].map(|n| Driver::new(&ram, n, 128, u64::from(n) * 0x4000));
        let (activation, notified) = activation(&[&queues[0], &queues[1], &queues[2]], 0);
        device.activate(activation).unwrap();
        for number in 0..64 {
            queues[0].add(&[], &[(INTO + number * u64::from(SIZE), SIZE)]);
        }
        Self { device, queues, notified, folder, taken: 0, buffer: 1 << 20 }
    }

    fn path(&self, suffix: &str) -> std::path::PathBuf {
        self.folder.path().join(format!("s{suffix}"))
    }

    /// Sends a packet, and waits until it has been taken.
    fn send(&mut self, ports: Ports, op: Op, flags: u32, data: &[u8]) {
        let (length, op) = (data.len() as u32, Some(op));
        let header = Header { ports, length, op, flags, buffer: self.buffer, forwarded: self.taken };
        self.send_raw(&[&swapped(header.bytes(CID))[..], data].concat());
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        let driver = &mut self.queues[1];
        driver.ram.memory().write_slice(bytes, GuestAddress(OUT)).unwrap();
        let middle = bytes.len().min(20) as u32;
        driver.add(&[(OUT, middle), (OUT + u64::from(middle), bytes.len() as u32 - middle)], &[]);
        driver.kick();
        assert!(driver.used().is_some());
    }

    /// The next packet; its buffer is offered again.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let driver = &mut self.queues[0];
        let (head, length) = driver.used().expect("a packet");
        let at = INTO + u64::from(head % 64) * u64::from(SIZE);
        let mut bytes = vec![0; length as usize];
        driver.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let slot = head as u16;
        driver.offer(slot);
        driver.kick();
        (of_host(&bytes), bytes[HEADER..].to_vec())
    }

    /// A connection that the guest asks for, and the host's end of it.
    fn connected(&mut self) -> (Ports, UnixStream) {
        let listener = UnixListener::bind(self.path("_80")).unwrap();
        let ports = Ports { host: 80, guest: 1000 };
        self.send(ports, Op::Request, 0, &[]);
        let (header, _) = self.receive();
        assert_eq!((header.ports, header.op, header.buffer), (ports, Some(Op::Response), BUFFER));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        std::fs::remove_file(self.path("_80")).unwrap();
        (ports, stream)
    }
}

/// The same header from the guest to the host.
fn swapped(mut bytes: [u8; HEADER]) -> [u8; HEADER] {
    for at in 0..8 {
        bytes.swap(at, at + 8);
    }
    for at in 16..20 {
        bytes.swap(at, at + 4);
    }
    bytes
}

/// What a packet of the host's says.
fn of_host(bytes: &[u8]) -> Header {
    let ram = GuestRam::new(1 << 20).unwrap();
    let header = swapped(bytes[..HEADER].try_into().unwrap());
    ram.memory().write_slice(&header, GuestAddress(0)).unwrap();
    let mut driver = Driver::new(&Arc::new(ram), 0, 16, 0x8000);
    driver.add(&[(0, HEADER as u32)], &[]);
    let (activation, _) = activation(&[&driver], 0);
    let chain = driver.queue.lock(&activation.ram, activation.notify.as_ref()).pop().unwrap().unwrap();
    Header::read(&activation.ram, &chain.readable, CID).unwrap().unwrap()
}

#[test]
fn a_guest_reaches_who_listens_and_both_hear_each_other() {
    let mut machine = Machine::new();
    let (ports, mut stream) = machine.connected();
    machine.send(ports, Op::Data, 0, b"from the guest");
    let mut bytes = [0; 14];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the guest");
    stream.write_all(&[9; 6000]).unwrap();
    let mut came = Vec::new();
    while came.len() < 6000 {
        let (header, data) = machine.receive();
        assert_eq!((header.op, header.length as usize, header.forwarded), (Some(Op::Data), data.len(), 14));
        came.extend(data);
    }
    assert_eq!(came, [9; 6000]);
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let (header, _) = machine.receive();
    assert_eq!((header.op, header.flags), (Some(Op::Shutdown), 2), "it sends no more, and still receives");
    machine.send(ports, Op::Data, 0, b"more");
    stream.read_exact(&mut bytes[..4]).unwrap();
    machine.send(ports, Op::Shutdown, 3, &[]);
    assert_eq!(machine.receive().0.op, Some(Op::Reset));
    assert_eq!(stream.read(&mut bytes).unwrap(), 0);
}

#[test]
fn a_port_where_nobody_listens_is_refused() {
    let mut machine = Machine::new();
    let ports = Ports { host: 81, guest: 5 };
    machine.send(ports, Op::Request, 0, &[]);
    let (header, _) = machine.receive();
    assert_eq!((header.ports, header.op), (ports, Some(Op::Reset)));
}

#[test]
fn a_program_of_the_host_reaches_the_guest() {
    let mut machine = Machine::new();
    let mut stream = UnixStream::connect(machine.path("")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"CONN").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(5));
    stream.write_all(b"ECT 52\nat once").unwrap();
    let (header, _) = machine.receive();
    assert_eq!((header.op, header.ports.guest), (Some(Op::Request), 52));
    machine.send(header.ports, Op::Response, 0, &[]);
    let (data, bytes) = machine.receive();
    assert_eq!((data.op, &bytes[..]), (Some(Op::Data), &b"at once"[..]));
    machine.send(header.ports, Op::Data, 0, b"yes");
    let expected = format!("OK {}\nyes", header.ports.host);
    let mut answer = vec![0; expected.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, expected.as_bytes());
    drop(stream);
    let last = std::iter::from_fn(|| Some(machine.receive().0.op)).find(|op| *op == Some(Op::Reset));
    assert!(last.is_some(), "the guest hears that it has gone");
}

#[test]
fn programs_that_talk_nonsense_are_hung_up_on() {
    let machine = Machine::new();
    for words in ["GET / HTTP/1.1\r\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT 11111111111111111111111111111"]
    {
        let mut stream = UnixStream::connect(machine.path("")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(words.as_bytes()).unwrap();
        let ended = stream.read(&mut [0; 9]);
        assert!(matches!(ended, Ok(0)) || ended.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset), "{words}");
    }
    // Those that say nothing give way to others.
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(machine.path("")).unwrap()).collect();
    silent[0].set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!((&silent[0]).read(&mut [0; 9]).unwrap(), 0);
}

#[test]
fn neither_side_sends_more_than_there_is_room_for() {
    let mut machine = Machine::new();
    machine.buffer = 100;
    let (ports, mut stream) = machine.connected();
    stream.write_all(&[1; 250]).unwrap();
    let mut came = 0;
    while came < 250 {
        let (header, data) = machine.receive();
        match header.op {
            Some(Op::Data) => came += data.len() as u32,
            Some(Op::CreditRequest) => {
                assert_eq!(came % 100, 0);
                machine.taken = came;
                machine.send(ports, Op::CreditUpdate, 0, &[]);
            }
            other => panic!("{other:?}"),
        }
    }
    machine.send(ports, Op::CreditRequest, 0, &[]);
    let credit = std::iter::from_fn(|| Some(machine.receive().0)).find(|header| header.op == Some(Op::CreditUpdate));
    assert_eq!(credit.unwrap().forwarded, 0);
    // Nobody reads: the stream and the buffer fill up, and then the guest has broken its word.
    for _ in 0..200 {
        machine.send(ports, Op::Data, 0, &[7; 16_000]);
    }
    let reset = std::iter::from_fn(|| Some(machine.receive().0.op)).find(|op| *op == Some(Op::Reset));
    assert!(reset.is_some());
    assert!(machine.notified.faults().is_empty());
}

#[test]
fn connections_end_where_the_guest_leaves_them() {
    let first = Machine::at_rest();
    let mut second = Machine::at_rest();
    second.queues[2].add(&[], &[(OUT + 0x1000, 4)]);
    second.queues[2].ram.memory().write_slice(&[9; 4], GuestAddress(OUT + 0x1000)).unwrap();
    second.device.restore(&first.device.save()).unwrap();
    second.device.resume();
    assert_eq!(second.queues[2].used(), Some((0, 4)));
    let mut event = [9; 4];
    second.queues[2].ram.memory().read_slice(&mut event, GuestAddress(OUT + 0x1000)).unwrap();
    assert_eq!(event, [0; 4]);
    second.send(Ports { host: 80, guest: 1000 }, Op::Data, 0, b"old");
    assert_eq!(second.receive().0.op, Some(Op::Reset));
    let path = second.path("");
    drop(second);
    assert!(!path.exists());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn no_packet_does_harm(packets in prop::collection::vec((
        0..3_u32, 0..2_u32, 0..9_u16, any::<u32>(), 0..3000_usize, any::<u32>(), any::<u32>(), prop::option::of(0..60_usize)), 1..30)) {
        let mut machine = Machine::new();
        let (_, stream) = machine.connected();
        stream.set_nonblocking(true).unwrap();
        for (host, guest, op, flags, length, buffer, forwarded, cut) in packets {
            let ports = Ports { host: 79 + host, guest: 999 + guest };
            let header = Header { ports, length: length as u32, op: None, flags, buffer, forwarded };
            let mut bytes = [&swapped(header.bytes(CID))[..], &vec![5; length]].concat();
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            bytes.truncate(cut.unwrap_or(usize::MAX));
            machine.send_raw(&bytes);
            let _ = (&stream).write(&[1; 50]);
            let _ = (&stream).read(&mut [0; 100]);
        }
        machine.device.pause(Instant::now() + LIMIT).unwrap();
        prop_assert!(machine.notified.faults().is_empty());
    }

    #[test]
    fn no_chain_does_harm(
        raw in prop::collection::vec((0..3_usize, 0..RAM + 9999, 0..70_000_u32, 0..4_u16, 0..9_u16), 1..12)) {
        let mut machine = Machine::new();
        let (_, stream) = machine.connected();
        stream.set_nonblocking(true).unwrap();
        for (queue, address, length, flags, next) in raw {
            let _ = (&stream).write(&[1; 50]);
            machine.queues[queue].write_descriptor(next % 8, (address, length, flags, next));
            machine.queues[queue].offer(next % 8);
            machine.queues[queue].kick();
        }
        machine.device.pause(Instant::now() + LIMIT).unwrap();
    }
}
