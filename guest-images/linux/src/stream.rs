//! A stream of bytes whose every byte follows from its place, for both ends of a connection: what is lost, repeated, changed or
//! out of order is told with its place.
//!
//! It is sent as frames: the offset of the first byte (u64, little-endian), the number of bytes (u32), the bytes. A frame of none
//! is the end, and its offset how many bytes there were.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What the guest sends.
pub const OF_GUEST: u64 = 0x6775_6573_7400;
/// What the host sends.
pub const OF_HOST: u64 = 0x686f_7374_0000;

const HEADER_BYTES: usize = 12;
/// The longest frame.
const FRAME_BYTES: usize = 32 << 10;

/// The eight bytes at a multiple of eight.
fn word(seed: u64, index: u64) -> u64 {
    // splitmix64.
    let mut word = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The bytes of a stream from this offset on.
pub fn fill(seed: u64, offset: u64, bytes: &mut [u8]) {
    let mut at = offset;
    let mut rest = bytes;
    while !rest.is_empty() {
        let of_word = word(seed, at / 8).to_le_bytes();
        let part = &of_word[(at % 8) as usize..];
        let length = part.len().min(rest.len());
        let (now, later) = rest.split_at_mut(length);
        now.copy_from_slice(&part[..length]);
        at += length as u64;
        rest = later;
    }
}

/// Sends a stream until `is_over`, a frame and a pause in turn, then its end; how many bytes there were. `sent` counts them
/// meanwhile.
///
/// # Errors
/// When the connection ends.
pub fn send(
    mut to: impl Write,
    seed: u64,
    pause: Duration,
    sent: &AtomicU64,
    is_over: impl Fn() -> bool,
) -> Result<u64, String> {
    let mut frame = vec![0; HEADER_BYTES + FRAME_BYTES];
    let mut offset = 0;
    loop {
        // Long and short ones in turn.
        let length = if is_over() { 0 } else { 1 + (word(seed, !offset) as usize) % FRAME_BYTES };
        frame[..8].copy_from_slice(&offset.to_le_bytes());
        frame[8..HEADER_BYTES].copy_from_slice(&(length as u32).to_le_bytes());
        let whole = &mut frame[..HEADER_BYTES + length];
        fill(seed, offset, &mut whole[HEADER_BYTES..]);
        to.write_all(whole).and_then(|()| to.flush()).map_err(|e| format!("at byte {offset} of what is sent: {e}"))?;
        if length == 0 {
            return Ok(offset);
        }
        offset += length as u64;
        sent.store(offset, Ordering::Relaxed);
        std::thread::sleep(pause);
    }
}

/// Receives a stream to its end, and checks every byte; how many there were. `received` counts them meanwhile.
///
/// # Errors
/// When a byte is not what it must be, or the connection ends before the stream does.
pub fn receive(mut from: impl Read, seed: u64, received: &AtomicU64) -> Result<u64, String> {
    let mut header = [0; HEADER_BYTES];
    let (mut bytes, mut expected) = (vec![0; FRAME_BYTES], vec![0; FRAME_BYTES]);
    let mut at = 0_u64;
    loop {
        let broken = |e| format!("at byte {at} of what is received: {e}");
        from.read_exact(&mut header).map_err(broken)?;
        let [o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = header;
        let offset = u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if offset != at {
            return Err(format!("a frame of byte {offset} came where byte {at} was to come"));
        }
        if length == 0 {
            return Ok(at);
        }
        if length > FRAME_BYTES {
            return Err(format!("at byte {at} a frame of {length} bytes"));
        }
        let (bytes, expected) = (&mut bytes[..length], &mut expected[..length]);
        from.read_exact(bytes).map_err(broken)?;
        fill(seed, at, expected);
        if let Some(place) = bytes.iter().zip(&*expected).position(|(found, expected)| found != expected) {
            let (found, expected) = (bytes[place], expected[place]);
            return Err(format!("byte {} is {found:#04x}, and was sent as {expected:#04x}", at + place as u64));
        }
        at += length as u64;
        received.store(at, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A stream of so many frames, and its length.
    fn stream(frames: u32) -> (Vec<u8>, u64) {
        let mut bytes = Vec::new();
        let left = Cell::new(frames);
        let sent = AtomicU64::new(0);
        let is_over = || left.replace(left.get().saturating_sub(1)) == 0;
        let length = send(&mut bytes, OF_HOST, Duration::ZERO, &sent, is_over).unwrap();
        assert_eq!(length, sent.into_inner());
        (bytes, length)
    }

    fn received(bytes: &[u8]) -> Result<u64, String> {
        receive(bytes, OF_HOST, &AtomicU64::new(0))
    }

    /// Where the second frame begins.
    fn second(bytes: &[u8]) -> usize {
        HEADER_BYTES + u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize
    }

    #[test]
    fn a_stream_arrives_whole() {
        for frames in [0, 1, 20] {
            let (bytes, length) = stream(frames);
            assert_eq!(received(&bytes), Ok(length));
        }
    }

    #[test]
    fn bytes_follow_from_their_places() {
        let mut whole = [0; 100];
        fill(7, 1000, &mut whole);
        for (from, to) in [(0, 1), (3, 8), (5, 29), (13, 100)] {
            let mut part = vec![0; to - from];
            fill(7, 1000 + from as u64, &mut part);
            assert_eq!(part, whole[from..to]);
        }
        let mut other = [0; 100];
        fill(8, 1000, &mut other);
        assert_ne!(whole, other);
    }

    #[test]
    fn a_changed_byte_is_told_with_its_place() {
        let (mut bytes, _) = stream(3);
        let at = second(&bytes) + HEADER_BYTES + 5;
        bytes[at] ^= 1;
        let place = at - 2 * HEADER_BYTES;
        assert!(received(&bytes).unwrap_err().starts_with(&format!("byte {place} is")));
    }

    #[test]
    fn what_is_lost_or_repeated_is_told() {
        let (bytes, _) = stream(3);
        let second = second(&bytes);
        let lost = &bytes[second..];
        assert!(received(lost).unwrap_err().contains("where byte 0 was to come"));
        let repeated = [&bytes[..second], &bytes[..]].concat();
        assert!(received(&repeated).unwrap_err().starts_with("a frame of byte 0 came"));
        let mut shorter = bytes.clone();
        shorter.remove(second + HEADER_BYTES);
        assert!(received(&shorter).is_err());
        assert!(received(&bytes[..bytes.len() - 1]).unwrap_err().contains("of what is received"));
    }
}
