//! Taps of the host, each test in a network of its own.

use std::os::fd::AsRawFd;
use std::process::Command;

use super::super::sys;
use super::*;

/// Runs a test in a network that is gone with it; says so where this user may not have one.
fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        if let Err(e) = sys::own_network() {
            command_line::note(format_args!("skipped: no network of the test's own ({e}); it takes root"));
            return;
        }
        if let Err(e) = Tap::open(&TapSource::Name("none".into()), 1)
            && matches!(e, TapError::NoDriver { .. })
        {
            command_line::note(format_args!("skipped: {e}"));
            return;
        }
        // Nothing but what the test sends.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
    });
    thread.join().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn named(name: &str) -> TapSource {
    TapSource::Name(name.into())
}

fn refused(source: &TapSource, queues: u16) -> String {
    Tap::open(source, queues).unwrap_err().to_string()
}

#[test]
fn a_tap_that_cannot_be_used_is_refused_with_what_to_do() {
    in_own_network(|| {
        assert!(
            refused(&named("tap0"), 1)
                .contains("ip tuntap add dev tap0 mode tap user $USER vnet_hdr; ip link set tap0 up")
        );
        assert!(refused(&named("tap0"), 1).contains("ip tuntap add"), "and none was made");
        ip("tuntap add dev tap0 mode tap");
        let first = Tap::open(&named("tap0"), 1).unwrap();
        assert_eq!((first.mtu(), first.queues()), (1500, 1));
        assert!(refused(&named("tap0"), 1).contains("in use"));
        drop(first);
        assert!(Tap::open(&named("tap0"), 1).is_ok(), "and it is there still");
        let why = refused(&named("tap0"), 2);
        assert!(why.contains("has one queue") && why.contains("multi_queue"), "{why}");
        assert!(refused(&named("lo"), 1).contains("is not a tap"));
        assert!(refused(&named("a-name-that-is-too-long"), 1).contains("no interface"));
        ip("tuntap add dev tun0 mode tun");
        assert!(refused(&named("tun0"), 1).contains("is not a tap"));
        let options: NetOptions = "tap=tap0,mtu=9000".parse().unwrap();
        assert!(options.open().unwrap_err().to_string().contains("ip link set tap0 mtu 9000"));
        ip("link set tap0 mtu 9000");
        let tap = options.open().unwrap();
        assert_eq!((options.config(&tap).unwrap().mtu, options.config(&tap).unwrap().pairs), (9000, 1));
    });
}

#[test]
fn a_descriptor_has_to_be_of_a_tap() {
    in_own_network(|| {
        assert!(refused(&TapSource::Descriptor(9999), 1).contains("not open"));
        assert!(refused(&TapSource::Descriptor(-1), 1).contains("not open"));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(refused(&TapSource::Descriptor(null.as_raw_fd()), 1).contains("not an open tap"));
        ip("tuntap add dev tap0 mode tap");
        let tap = Tap::open(&named("tap0"), 1).unwrap();
        let number = tap.queue(0).unwrap().as_raw_fd();
        assert!(refused(&TapSource::Descriptor(number), 2).contains("one queue"));
        let second = Tap::open(&TapSource::Descriptor(number), 1).unwrap();
        assert_eq!((second.name(), second.mtu()), ("tap0", 1500));
    });
}

#[test]
fn what_the_kernel_says_of_a_tap_is_told_in_words() {
    let said = |errno| super::super::tap::refusal("tap0", 2, io::Error::from_raw_os_error(errno)).to_string();
    assert!(said(libc::EPERM).contains("not this user's") && said(libc::EPERM).contains("multi_queue"));
    assert!(said(libc::EBUSY).contains("in use"));
    assert!(said(libc::EIO).contains("TUNSETIFF"));
}

#[test]
fn a_tap_that_goes_takes_the_link_down_and_nothing_else() {
    in_own_network(|| {
        ip("tuntap add dev tap0 mode tap");
        let mut machine = Machine::with_tap(Tap::open(&named("tap0"), 1).unwrap(), 1, &[MRG_RXBUF]);
        machine.offer_buffer(BUFFERS, 4096);
        // It is down: what is sent is lost.
        machine.write(BUFFERS + 0x1000, &frame(100, 1));
        let send = |machine: &mut Machine| {
            machine.queues[1].add(&[(BUFFERS + 0x1000, 112)], &[]);
            machine.queues[1].kick();
            assert!(machine.queues[1].used().is_some());
        };
        send(&mut machine);
        assert_eq!(machine.status(), 1);
        ip("link del tap0");
        let deadline = Instant::now() + LIMIT;
        while machine.status() != 0 {
            assert!(Instant::now() < deadline, "the link is down");
            std::thread::sleep(Duration::from_millis(1));
        }
        send(&mut machine);
        machine.net.pause(Instant::now() + LIMIT).unwrap();
        machine.net.resume();
        send(&mut machine);
        assert!(machine.notified.faults().is_empty());
    });
}

/// A guest on `tap0` and, across a bridge, the other end: `tap1`, as a guest would have it.
fn bridged(queues: u16) -> (Tap, Tap) {
    let many = if queues > 1 { " multi_queue" } else { "" };
    ip("link add br0 type bridge");
    for name in ["tap0", "tap1"] {
        let many = if name == "tap0" { many } else { "" };
        ip(&format!("tuntap add dev {name} mode tap{many}"));
        ip(&format!("link set {name} master br0 up"));
    }
    ip("link set br0 up");
    let [guest, peer] = [("tap0", queues), ("tap1", 1)].map(|(name, queues)| Tap::open(&named(name), queues).unwrap());
    peer.set_offload(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6).unwrap();
    // The carrier came with whoever opened them, and the bridge hears of it from a thread of the kernel's.
    std::thread::sleep(Duration::from_millis(200));
    (guest, peer)
}

/// A frame of TCP over IPv4 with its header, of one segment or of what a network card cuts.
fn tcp(to: u8, from: u8, payload: usize) -> Vec<u8> {
    let total = (40 + payload) as u16;
    let mut header = vec![0; HEADER];
    if payload > 1460 {
        // Checksum needed; TCP over IPv4; length of headers and segments; where the checksum is.
        header[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    }
    let mut ethernet = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0];
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, to];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    ip[10..12].copy_from_slice(&(!(((sum >> 16) + (sum & 0xffff)) as u16)).to_be_bytes());
    let tcp = [0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
    let body = frame(payload, to)[HEADER..].to_vec();
    ethernet.append(&mut ip);
    [header, ethernet, tcp.to_vec(), body].concat()
}

fn send(tap: &Tap, bytes: &[u8]) {
    rustix::io::write(tap.queue(0).unwrap(), bytes).unwrap();
}

/// The next frame at a tap from this station.
fn receive(tap: &Tap, from: u8) -> Vec<u8> {
    let deadline = Instant::now() + LIMIT;
    let mut bytes = vec![0; receive::MOST];
    while Instant::now() < deadline {
        match rustix::io::read(tap.queue(0).unwrap(), &mut bytes) {
            Ok(count) if bytes[HEADER + 6..HEADER + 12] == [2, 0, 0, 0, 0, from] => return bytes[..count].to_vec(),
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    }
    panic!("no frame came");
}

/// The next frame from station 9 in the driver's buffers of a page each, taken and offered again.
fn arrived(machine: &mut Machine, queue: usize) -> Vec<u8> {
    loop {
        let mut bytes = Vec::new();
        let mut count = 1;
        while count > 0 {
            let (head, length) = machine.queues[queue].used().expect("a frame");
            let at = BUFFERS + 0x1000 * u64::from(head) + 0x10_0000 * (queue as u64 / 2);
            let part = machine.read(at, length as usize);
            if bytes.is_empty() {
                count = u16::from_le_bytes([part[10], part[11]]);
            }
            bytes.extend(part);
            count -= 1;
        }
        if bytes[HEADER + 6..HEADER + 12] == [2, 0, 0, 0, 0, 9] {
            return bytes;
        }
    }
}

/// Offers 200 buffers of a page for what arrives at a pair.
fn offer_buffers(machine: &mut Machine, pair: u64) {
    let queue = 2 * pair as usize;
    for number in 0..200 {
        machine.queues[queue].add(&[], &[(BUFFERS + 0x10_0000 * pair + 0x1000 * number, 0x1000)]);
    }
    machine.queues[queue].kick();
}

const SEGMENTS: [u32; 5] = [MRG_RXBUF, GUEST_CSUM, GUEST_TSO4, 0, 11];

#[test]
fn frames_go_both_ways_also_those_that_a_card_would_cut() {
    in_own_network(|| {
        let (tap, peer) = bridged(1);
        let mut machine = Machine::with_tap(tap, 1, &SEGMENTS);
        offer_buffers(&mut machine, 0);
        for payload in [6, 1000, 1460, 30_000, 65_000] {
            let out = tcp(9, 7, payload);
            machine.write(BUFFERS + 0x20_0000, &out);
            machine.queues[1].add(&[(BUFFERS + 0x20_0000, 12), (BUFFERS + 0x20_000c, out.len() as u32 - 12)], &[]);
            machine.queues[1].kick();
            let came = receive(&peer, 7);
            assert!(came[HEADER..] == out[HEADER..], "{payload} out");
            assert_eq!((&came[..2], &came[4..6]), (&out[..2], &out[4..6]));

            let into = tcp(7, 9, payload);
            send(&peer, &into);
            let came = arrived(&mut machine, 0);
            assert!(came[HEADER..] == into[HEADER..], "{payload} in: {} bytes came", came.len());
            assert_eq!((&came[..2], &came[4..6]), (&into[..2], &into[4..6]));
        }
    });
}

#[test]
fn what_the_driver_does_not_take_whole_comes_in_pieces() {
    in_own_network(|| {
        let (tap, peer) = bridged(1);
        let mut machine = Machine::with_tap(tap, 1, &[MRG_RXBUF]);
        offer_buffers(&mut machine, 0);
        send(&peer, &tcp(7, 9, 14_600));
        for _ in 0..10 {
            let came = arrived(&mut machine, 0);
            assert!(came.len() <= HEADER + 14 + 1500, "{} bytes", came.len());
            assert_eq!(came[..2], [0, 0], "whole, with its checksum");
        }
    });
}

#[test]
fn each_pair_of_queues_has_its_share() {
    in_own_network(|| {
        let (tap, peer) = bridged(2);
        let mut machine = Machine::with_tap(tap, 2, &[MRG_RXBUF, CTRL_VQ, MQ]);
        offer_buffers(&mut machine, 0);
        offer_buffers(&mut machine, 1);
        let frames = |count: u8, base: u16| {
            (0..count).map(move |flow| {
                let mut frame = tcp(7, 9, 20);
                frame[HEADER + 34..HEADER + 36].copy_from_slice(&(base + u16::from(flow)).to_be_bytes());
                frame
            })
        };
        frames(40, 1000).for_each(|frame| send(&peer, &frame));
        (0..40).for_each(|_| drop(arrived(&mut machine, 0)));
        assert_eq!(machine.queues[2].try_used(), None, "the second is not in use");
        // The command's place is in nobody's buffer.
        machine.write(0x8_0000, &[4, 0, 2, 0]);
        machine.queues[4].add(&[(0x8_0000, 4)], &[(0x8_0100, 1)]);
        machine.queues[4].kick();
        assert!(machine.queues[4].used().is_some());
        assert_eq!(machine.read(0x8_0100, 1), [0]);
        frames(60, 2000).for_each(|frame| send(&peer, &frame));
        let deadline = Instant::now() + LIMIT;
        let mut counts = [0, 0];
        while counts[0] + counts[1] < 60 && Instant::now() < deadline {
            for (pair, count) in counts.iter_mut().enumerate() {
                *count += usize::from(machine.queues[2 * pair].try_used().is_some());
            }
        }
        assert!(counts[0] > 5 && counts[1] > 5, "{counts:?}");
        // What the second pair sends goes out as well.
        machine.write(0x8_0000, &tcp(9, 7, 20));
        machine.queues[3].add(&[(0x8_0000, 86)], &[]);
        machine.queues[3].kick();
        assert_eq!(receive(&peer, 7).len(), 86);
    });
}
