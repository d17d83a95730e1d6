//! Frames of any size through any buffers, beside a naive model.

use super::*;

/// Lengths of the parts of each chain.
type Layout = Vec<Vec<u32>>;

fn layouts() -> impl Strategy<Value = Layout> {
    let part = prop_oneof![1..40_u32, 500..4000_u32];
    let chain = prop::collection::vec(part, 1..4).prop_filter("a header", |parts| parts.iter().sum::<u32>() >= 12);
    prop::collection::vec(chain, 1..24)
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![14..100_usize, 1000..1600_usize, 1600..20_000_usize], 1..8)
}

/// A chain's parts laid out one behind the other with gaps between.
fn place(layout: &Layout) -> Vec<Vec<(u64, u32)>> {
    let mut next = BUFFERS;
    let mut place = |length: &u32| {
        let at = next;
        next += u64::from(*length) + 7;
        (at, *length)
    };
    layout.iter().map(|chain| chain.iter().map(&mut place).collect()).collect()
}

/// What the driver finds: of each frame the number of chains, and all bytes that came.
fn expected(layout: &Layout, frames: &[Vec<u8>], is_mergeable: bool) -> Vec<(usize, Vec<u8>)> {
    let mut rooms = layout.iter().map(|chain| chain.iter().sum::<u32>() as usize).peekable();
    let mut found = Vec::new();
    for frame in frames {
        if is_mergeable {
            let mut room = 0;
            let mut count = 0;
            while room < frame.len() {
                let Some(next) = rooms.next() else { return found };
                (room, count) = (room + next, count + 1);
            }
            found.push((count, frame.clone()));
        } else {
            match rooms.peek() {
                Some(room) if *room >= frame.len() => drop(rooms.next()),
                Some(_) => continue,
                None => return found,
            }
            found.push((1, frame.clone()));
        }
    }
    found
}

impl Machine {
    fn gather(&self, parts: &[(u64, u32)], length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = parts.iter().flat_map(|(at, length)| self.read(*at, *length as usize)).collect();
        bytes.truncate(length);
        bytes
    }

    /// The next frame, through so many chains.
    fn arrived(&mut self, chains: &mut impl Iterator<Item = Vec<(u64, u32)>>, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..count {
            let (_, length) = self.queues[0].used().unwrap();
            bytes.extend(self.gather(&chains.next().unwrap(), length as usize));
        }
        bytes
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn frames_arrive_whatever_the_buffers_are(layout in layouts(), lengths in lengths(), is_mergeable in any::<bool>(), late in any::<bool>()) {
        let features: &[u32] = if is_mergeable { &[MRG_RXBUF] } else { &[] };
        let (tap, peer) = socket();
        let mut machine = Machine::at_rest(tap, 1, features);
        let frames: Vec<_> = lengths.iter().zip(1..).map(|(length, seed)| frame(*length, seed)).collect();
        let chains = place(&layout);
        machine.ram.take_own_writes();
        // With late buffers, a frame may find room for its beginning alone.
        let offer = |machine: &mut Machine, chains: &[Vec<(u64, u32)>]| {
            chains.iter().for_each(|chain| { machine.queues[0].add(&[], chain); });
            machine.queues[0].kick();
        };
        let early = if late && is_mergeable { chains.len() / 2 } else { chains.len() };
        offer(&mut machine, &chains[..early]);
        frames.iter().for_each(|frame| { peer.send(frame).unwrap(); });
        machine.net.resume();
        if early < chains.len() {
            std::thread::sleep(Duration::from_millis(2));
            offer(&mut machine, &chains[early..]);
        }
        let mut places = chains.clone().into_iter();
        let mut touched = Vec::new();
        for (count, frame) in expected(&layout, &frames, is_mergeable) {
            touched.extend(places.clone().take(count).flatten().map(|(at, _)| at / 4096).take(1));
            let mut bytes = machine.arrived(&mut places, count);
            prop_assert_eq!(u16::from_le_bytes([bytes[10], bytes[11]]), count as u16);
            bytes[10..12].fill(0);
            prop_assert!(bytes == frame, "a frame of {} bytes", frame.len());
        }
        machine.net.pause(Instant::now() + LIMIT).unwrap();
        prop_assert_eq!(machine.queues[0].try_used(), None);
        let own = machine.ram.take_own_writes();
        prop_assert!(touched.iter().all(|page| own.contains(crate::ram::RamPage(*page))), "what the kernel wrote is logged");
        prop_assert!(machine.notified.faults().is_empty());
    }

    #[test]
    fn frames_leave_whatever_the_buffers_are(frames in prop::collection::vec((0..20_000_usize, prop::collection::vec(0..20_000_usize, 0..5)), 1..8)) {
        let (mut machine, peer) = Machine::with_socket(&[]);
        let mut at = BUFFERS;
        for ((length, cuts), seed) in frames.iter().zip(1..) {
            let bytes = frame(*length, seed);
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut parts = Vec::new();
            for cut in cuts.windows(2) {
                machine.write(at, &bytes[cut[0]..cut[1]]);
                parts.push((at, (cut[1] - cut[0]) as u32));
                at += (cut[1] - cut[0]) as u64 + 5;
            }
            machine.queues[1].add(&parts, &[]);
        }
        machine.queues[1].kick();
        let mut bytes = vec![0; 30_000];
        for ((length, _), seed) in frames.iter().zip(1..) {
            prop_assert!(machine.queues[1].used().is_some());
            if *length >= 14 {
                let received = peer.recv(&mut bytes).unwrap();
                prop_assert!(bytes[..received] == frame(*length, seed));
            }
        }
        prop_assert!(machine.notified.faults().is_empty());
    }
}

#[test]
fn the_longest_frame_arrives_and_a_longer_one_does_not() {
    let (mut machine, peer) = Machine::with_socket(&[MRG_RXBUF]);
    for number in 0..40 {
        machine.offer_buffer(BUFFERS + 0x1000 * number, 0x1000);
    }
    let longest = frame(receive::MOST - HEADER, 1);
    peer.send(&frame(receive::MOST - HEADER + 1, 2)).unwrap();
    peer.send(&longest).unwrap();
    let mut chains = (0..40).map(|number| vec![(BUFFERS + 0x1000 * number, 0x1000)]);
    let bytes = machine.arrived(&mut chains, longest.len().div_ceil(0x1000));
    assert!(bytes[HEADER..] == longest[HEADER..]);
}
