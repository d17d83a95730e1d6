//! Frames that the guest sends and checks: raw Ethernet with an ethertype of its own, a sequence number and a checksum.
//!
//! | bytes | |
//! |---|---|
//! | 0 to 13 | Ethernet header, ethertype 0x88b5 (IEEE 802's first for local experiments) |
//! | 14, 15 | 0: as generated, 1: sent back |
//! | 16 to 23 | sequence number, little-endian |
//! | 24 to 31 | checksum of the number, the length and what follows |
//! | from 32 | anything, to the length of the frame |
//!
//! Compiled into the image and into the host library.

use crate::pattern::mix;

/// Bytes in front of what a frame carries beyond its head: the shortest frame.
pub const HEAD: usize = 32;

/// The longest frame: an Ethernet header and 1,500 bytes.
pub const LONGEST: usize = 1514;

/// IEEE Std 802 - Local Experimental Ethertype 1.
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Bytes of an [`announcement`], the fewest of a frame.
pub const ANNOUNCEMENT: usize = 60;

/// What a station says when it has been moved: an ARP request for its own address (RFC 5227, 3), of whom all who hear it learn
/// where it is. It has no address of IP, which is zeros.
pub fn announcement(mac: [u8; 6]) -> [u8; ANNOUNCEMENT] {
    let mut frame = [0; ANNOUNCEMENT];
    // Ethernet and IPv4, lengths of their addresses, request.
    let fields = [[0xff; 6], mac, [0x08, 0x06, 0, 1, 8, 0], [6, 4, 0, 1, 0, 0]];
    frame.iter_mut().zip(fields.into_iter().flatten()).for_each(|(to, from)| *to = from);
    frame.iter_mut().skip(22).zip(mac).for_each(|(to, from)| *to = from);
    frame
}

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A frame of this project's.
    Ours {
        /// Which of its sender's.
        sequence: u64,
        /// Whether it has been sent back.
        echoed: bool,
    },
    /// One of ours by its ethertype, and not as it was sent.
    Corrupt,
    /// Somebody else's.
    Other,
}

/// The sum of what a frame carries behind its head; the last word may be short.
#[inline]
pub fn sum(payload: &[u8]) -> u64 {
    let words = payload.chunks_exact(8);
    let mut last = [0; 8];
    last.iter_mut().zip(words.remainder()).for_each(|(to, from)| *to = *from);
    // Rotated at each step, so that words that change places are found.
    let sum = words.fold(0u64, |sum, word| sum.rotate_left(1).wrapping_add(number(word)));
    sum.rotate_left(1).wrapping_add(u64::from_le_bytes(last))
}

fn number(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(word)
}

fn checksum(sequence: u64, length: usize, sum: u64) -> u64 {
    mix(sequence ^ (length as u64) << 48).wrapping_add(sum)
}

/// Makes a frame of the bytes that `frame` already has behind its head, whose [`sum`] is given. A frame that is
/// shorter than its head stays as it is.
#[inline]
pub fn seal(frame: &mut [u8], destination: [u8; 6], source: [u8; 6], sequence: u64, sum: u64) {
    let check = checksum(sequence, frame.len(), sum).to_le_bytes();
    let Some(head) = frame.get_mut(..HEAD) else { return };
    let fields = destination.into_iter().chain(source).chain(ETHERTYPE).chain([0, 0]);
    head.iter_mut().zip(fields.chain(sequence.to_le_bytes()).chain(check)).for_each(|(to, from)| *to = from);
}

/// Turns a frame back to whoever sent it. The checksum leaves addresses and the mark out.
pub fn turn_back(frame: &mut [u8]) {
    let Some(head) = frame.first_chunk_mut::<HEAD>() else { return };
    for byte in 0..6 {
        head.swap(byte, byte + 6);
    }
    head[14] = 1;
}

/// Reads a frame.
#[inline]
pub fn read(frame: &[u8]) -> Frame {
    let Some((head, payload)) = frame.split_first_chunk::<HEAD>() else { return Frame::Other };
    if head[12..14] != ETHERTYPE {
        return Frame::Other;
    }
    let (sequence, check) = (number(&head[16..24]), number(&head[24..]));
    if check != checksum(sequence, frame.len(), sum(payload)) {
        return Frame::Corrupt;
    }
    Frame::Ours { sequence, echoed: head[14] == 1 }
}

/// What came of a stream of numbered frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// The next number that is expected; `None` before the first, which may be any.
    next: Option<u64>,
    /// Which of the 64 numbers before it have come, the latest in bit 0.
    seen: u64,
    /// Numbers that were passed over and have not come since.
    pub lost: u64,
    /// Numbers that came a second time, or so late that nobody knows.
    pub duplicate: u64,
}

impl Sequence {
    /// Takes in one frame's number.
    #[inline]
    pub fn take(&mut self, sequence: u64) {
        let next = self.next.unwrap_or(sequence);
        if sequence >= next {
            let passed = sequence - next;
            self.lost += passed;
            // Two steps, as one by 64 is none.
            self.seen = self.seen.checked_shl(passed.min(64) as u32).unwrap_or(0) << 1 | 1;
            self.next = Some(sequence.saturating_add(1));
            return;
        }
        let bit = 1u64.checked_shl((next - 1 - sequence).min(64) as u32).unwrap_or(0);
        // What was passed over before the first counts as come.
        if bit == 0 || self.seen & bit != 0 || self.lost == 0 {
            self.duplicate += 1;
        } else {
            self.seen |= bit;
            self.lost -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(sequence: u64, payload: &[u8]) -> Vec<u8> {
        let mut frame = [vec![0; HEAD], payload.to_vec()].concat();
        let sum = sum(payload);
        seal(&mut frame, [2; 6], [4; 6], sequence, sum);
        frame
    }

    #[test]
    fn short_and_foreign_frames_are_others() {
        assert_eq!(read(&[0; 14]), Frame::Other);
        assert_eq!(read(&[0; 60]), Frame::Other);
    }

    #[test]
    fn an_announcement_is_an_arp_request_of_its_station() {
        let frame = announcement([2, 0, 0, 0, 0, 7]);
        assert_eq!(frame[..14], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 8, 6]);
        assert_eq!(frame[14..28], [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 7]);
        assert_eq!(frame[28..], [0; 32]);
        assert_eq!(read(&frame), Frame::Other);
    }

    #[test]
    fn numbers_are_accounted_for() {
        let after = |numbers: &[u64]| {
            let mut sequence = Sequence::default();
            numbers.iter().for_each(|number| sequence.take(*number));
            (sequence.lost, sequence.duplicate)
        };
        assert_eq!(after(&[0, 1, 2]), (0, 0));
        assert_eq!(after(&[0, 3]), (2, 0));
        assert_eq!(after(&[0, 3, 2, 1]), (0, 0));
        assert_eq!(after(&[0, 1, 1, 0]), (0, 2));
        assert_eq!(after(&[500, 501, 100]), (0, 1));
        assert_eq!(after(&[0, 500, 501, 100]), (499, 1));
        assert_eq!(after(&[0, 64, 1, 65, 65]), (62, 1));
    }

    proptest! {
        #[test]
        fn a_frame_reads_as_it_was_sent_and_back(sequence: u64, payload in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut frame = frame(sequence, &payload);
            prop_assert_eq!(read(&frame), Frame::Ours { sequence, echoed: false });
            turn_back(&mut frame);
            prop_assert_eq!(read(&frame), Frame::Ours { sequence, echoed: true });
            prop_assert_eq!(&frame[..12], [[4; 6], [2; 6]].concat());
        }

        #[test]
        fn damage_is_found(sequence: u64, payload in prop::collection::vec(any::<u8>(), 1..100), at: prop::sample::Index, bit in 0u8..8) {
            let mut frame = frame(sequence, &payload);
            let at = 16 + at.index(frame.len() - 16);
            frame[at] ^= 1 << bit;
            prop_assert_eq!(read(&frame), Frame::Corrupt);
        }

        #[test]
        fn any_order_of_all_numbers_loses_none(order in Just((1u64..40).collect::<Vec<_>>()).prop_shuffle()) {
            let mut sequence = Sequence::default();
            sequence.take(0);
            order.iter().for_each(|number| sequence.take(*number));
            prop_assert_eq!((sequence.lost, sequence.duplicate), (0, 0));
        }

        #[test]
        fn reading_never_panics(frame in prop::collection::vec(any::<u8>(), 0..80)) {
            read(&frame);
        }
    }
}
