//! Frames: a header with kind, version, number, length and checksums, then a payload.

use std::io::{Read, Write};
use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MAX_MESSAGE, WireError, pages};

/// What a payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// A [`super::Message`].
    Message = 1,
    /// A [`super::PageBatch`].
    Pages = 2,
}

impl Kind {
    /// The version of the payload that this program writes and reads.
    const VERSION: u16 = 1;

    fn from_wire(kind: u16) -> Option<Self> {
        match kind {
            1 => Some(Self::Message),
            2 => Some(Self::Pages),
            _ => None,
        }
    }

    /// The longest payload of this kind, in bytes.
    fn limit(self) -> usize {
        match self {
            Self::Message => MAX_MESSAGE,
            Self::Pages => pages::MAX_PAYLOAD,
        }
    }
}

/// What every header begins with.
const MAGIC: u32 = u32::from_le_bytes(*b"TCLF");

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: U32,
    kind: U16,
    version: U16,
    /// Counts the frames of this direction from 0.
    sequence: U32,
    /// Bytes of payload.
    length: U32,
    /// CRC-32 of the payload.
    payload_crc: U32,
    /// CRC-32 of the header up to here.
    header_crc: U32,
}

/// So much is read at a time, and summed while it is in the processor's nearer caches, in bytes.
const PIECE: usize = 64 << 10;

const CHECKED_HEADER: usize = size_of::<Header>() - size_of::<U32>();

impl Header {
    /// The header of frame `sequence`, its kind, and how long its payload is, which is no more than a frame of its kind may
    /// have, and no more than `most`.
    fn check(bytes: &[u8; size_of::<Self>()], sequence: u32, most: usize) -> Result<(Self, Kind, usize), WireError> {
        let header = Self::read_from_bytes(bytes).map_err(|_| WireError::Header { sequence })?;
        if header.magic.get() != MAGIC || header.header_crc.get() != crc32fast::hash(&bytes[..CHECKED_HEADER]) {
            return Err(WireError::Header { sequence });
        }
        if header.sequence.get() != sequence {
            return Err(WireError::Sequence { expected: sequence, found: header.sequence.get() });
        }
        let (kind, version) = (header.kind.get(), header.version.get());
        let known = Kind::from_wire(kind).filter(|_| version == Kind::VERSION);
        let kind = known.ok_or(WireError::Unknown { sequence, kind, version })?;
        let (length, limit) = (header.length.get(), kind.limit().min(most));
        if length as usize > limit {
            return Err(WireError::TooLong { sequence, length: u64::from(length), limit });
        }
        Ok((header, kind, length as usize))
    }
}

/// Writes frames.
#[derive(Debug)]
pub struct FrameWriter<W> {
    link: W,
    sequence: u32,
    bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    /// A writer that begins with frame 0.
    pub fn new(link: W) -> Self {
        Self { link, sequence: 0, bytes: 0 }
    }

    /// Writes one frame, header and payload in one go.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn write(&mut self, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
        self.write_summed(kind, payload, crc32fast::hash(payload))
    }

    /// As [`FrameWriter::write`], for who knows the payload's CRC-32 already.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn write_summed(&mut self, kind: Kind, payload: &[u8], sum: u32) -> Result<(), WireError> {
        let mut header = Header {
            magic: U32::new(MAGIC),
            kind: U16::new(kind as u16),
            version: U16::new(Kind::VERSION),
            sequence: U32::new(self.sequence),
            length: U32::new(payload.len() as u32),
            payload_crc: U32::new(sum),
            header_crc: U32::ZERO,
        };
        header.header_crc = U32::new(crc32fast::hash(&header.as_bytes()[..CHECKED_HEADER]));
        write_both(&mut self.link, header.as_bytes(), payload)?;
        self.sequence = self.sequence.wrapping_add(1);
        self.bytes += (size_of::<Header>() + payload.len()) as u64;
        Ok(())
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The connection.
    pub fn link(&mut self) -> &mut W {
        &mut self.link
    }
}

/// Both parts with one system call where the connection takes them whole.
fn write_both(link: &mut impl Write, header: &[u8], payload: &[u8]) -> std::io::Result<()> {
    let sent = link.write_vectored(&[std::io::IoSlice::new(header), std::io::IoSlice::new(payload)])?;
    if let Some(rest) = header.get(sent..) {
        link.write_all(rest)?;
    }
    link.write_all(payload.get(sent.saturating_sub(header.len())..).unwrap_or_default())
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    link: R,
    sequence: u32,
    limit: usize,
}

impl<R: Read> FrameReader<R> {
    /// A reader that expects frame 0.
    pub fn new(link: R) -> Self {
        Self { link, sequence: 0, limit: usize::MAX }
    }

    /// From now on no payload may be longer than this, whatever its kind.
    pub fn set_limit(&mut self, bytes: usize) {
        self.limit = bytes;
    }

    /// Reads one frame's payload into `payload`, replacing what is there. No more is allocated than a frame of its kind
    /// may have.
    ///
    /// # Errors
    /// When the connection fails or the frame is garbled, too long, of unknown kind or not the next.
    pub fn read(&mut self, payload: &mut Vec<u8>) -> Result<Kind, WireError> {
        let sequence = self.sequence;
        let mut bytes = [0; size_of::<Header>()];
        self.link.read_exact(&mut bytes)?;
        let (header, kind, length) = Header::check(&bytes, sequence, self.limit)?;
        payload.resize(length, 0);
        let mut sum = crc32fast::Hasher::new();
        for piece in payload.chunks_mut(PIECE) {
            self.link.read_exact(piece)?;
            sum.update(piece);
        }
        if sum.finalize() != header.payload_crc.get() {
            return Err(WireError::Checksum { sequence });
        }
        self.sequence = sequence.wrapping_add(1);
        Ok(kind)
    }

    /// Number of the frame that was read last.
    pub fn last_sequence(&self) -> u32 {
        self.sequence.wrapping_sub(1)
    }

    /// The connection, to be used otherwise: nothing has been read ahead.
    pub fn into_link(self) -> R {
        self.link
    }

    /// The connection.
    pub fn link(&mut self) -> &mut R {
        &mut self.link
    }
}

/// A frame whose checksums are right.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'b> {
    /// Its number.
    pub sequence: u32,
    /// What its payload is.
    pub kind: Kind,
    /// Its payload.
    pub payload: &'b [u8],
}

/// Puts frames together from what has come so far, for whoever must not wait for the rest of one.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    /// Where in `bytes` that is which has come and has not been given out; behind it is room.
    kept: Range<usize>,
    sequence: u32,
}

impl FrameBuffer {
    /// Takes what there is: `read` is given room, says how much of it was used, and does not wait. Returns whether there was
    /// something.
    ///
    /// # Errors
    /// When the connection fails or has ended.
    pub fn fill(&mut self, read: impl FnOnce(&mut [u8]) -> std::io::Result<usize>) -> Result<bool, WireError> {
        if self.kept.start > 0 {
            self.bytes.copy_within(self.kept.clone(), 0);
            self.kept = 0..self.kept.len();
        }
        let end = self.kept.end;
        if self.bytes.len() < end + PIECE {
            self.bytes.resize(end + PIECE, 0);
        }
        match read(&mut self.bytes[end..end + PIECE]) {
            Ok(0) => Err(WireError::Closed),
            Ok(more) => {
                self.kept.end += more;
                Ok(true)
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// The next frame, if all of it has come.
    ///
    /// # Errors
    /// When it is garbled, too long, of unknown kind or not the next. No more is ever kept than a frame and one piece.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, WireError> {
        let sequence = self.sequence;
        let Some((head, rest)) = self.bytes[self.kept.clone()].split_first_chunk() else { return Ok(None) };
        let (header, kind, length) = Header::check(head, sequence, usize::MAX)?;
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        if crc32fast::hash(payload) != header.payload_crc.get() {
            return Err(WireError::Checksum { sequence });
        }
        self.kept.start += size_of::<Header>() + length;
        self.sequence = sequence.wrapping_add(1);
        Ok(Some(Frame { sequence, kind, payload }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = FrameWriter::new(&mut bytes);
        for payload in payloads {
            writer.write(Kind::Message, payload).unwrap();
        }
        bytes
    }

    fn read_all(bytes: &[u8]) -> (Vec<Vec<u8>>, WireError) {
        let mut reader = FrameReader::new(bytes);
        let mut all = Vec::new();
        let mut payload = Vec::new();
        loop {
            match reader.read(&mut payload) {
                Ok(_) => all.push(payload.clone()),
                Err(e) => return (all, e),
            }
        }
    }

    /// The same as [`read_all`], of bytes that come as they please.
    fn read_pieces(mut bytes: &[u8], pieces: &[usize]) -> (Vec<Vec<u8>>, Option<WireError>) {
        let mut buffer = FrameBuffer::default();
        let mut all = Vec::new();
        for most in pieces.iter().cycle() {
            let filled = buffer.fill(|room| {
                let (now, later) = bytes.split_at((*most).min(bytes.len()).min(room.len()));
                room[..now.len()].copy_from_slice(now);
                bytes = later;
                if *most == 0 { Err(std::io::ErrorKind::WouldBlock.into()) } else { Ok(now.len()) }
            });
            match filled {
                Ok(came) => assert_eq!(came, *most > 0),
                Err(e) => return (all, Some(e)),
            }
            loop {
                match buffer.next_frame() {
                    Ok(Some(frame)) => {
                        assert_eq!(frame.sequence as usize, all.len());
                        all.push(frame.payload.to_vec());
                    }
                    Ok(None) => break,
                    Err(e) => return (all, Some(e)),
                }
            }
        }
        (all, None)
    }

    proptest! {
        /// In whatever pieces a stream comes, whole or damaged: the same frames, and the same complaint.
        #[test]
        fn pieces_are_put_together(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            mut pieces in prop::collection::vec(0..200_usize, 1..20),
            damage in prop::option::of((any::<prop::sample::Index>(), 1..=255_u8)),
        ) {
            pieces.push(1);
            let mut bytes = stream(&payloads);
            if let Some((at, change)) = damage.filter(|_| !bytes.is_empty()) {
                let at = at.index(bytes.len());
                bytes[at] ^= change;
            }
            let (read, end) = read_all(&bytes);
            let (pieced, pieced_end) = read_pieces(&bytes, &pieces);
            prop_assert_eq!(read, pieced);
            prop_assert_eq!(Some(end.to_string()), pieced_end.map(|e| e.to_string()));
        }

        #[test]
        fn what_is_written_is_read(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8)) {
            let (read, end) = read_all(&stream(&payloads));
            prop_assert_eq!(read, payloads);
            prop_assert!(matches!(end, WireError::Closed));
        }

        /// Any one flipped bit is found; what came before it is whole.
        #[test]
        fn a_flipped_bit_is_found(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 1..5),
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let mut bytes = stream(&payloads);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let (read, end) = read_all(&bytes);
            prop_assert!(read.len() < payloads.len());
            prop_assert!(payloads.starts_with(&read));
            prop_assert!(!matches!(end, WireError::Closed) || read.len() < payloads.len());
        }

        /// A stream cut anywhere ends as cut, never as something else.
        #[test]
        fn a_cut_is_found(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 1..5), at in any::<prop::sample::Index>()) {
            let bytes = stream(&payloads);
            let (read, end) = read_all(&bytes[..at.index(bytes.len())]);
            prop_assert!(payloads.starts_with(&read));
            prop_assert!(matches!(end, WireError::Closed));
        }

        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 24..200)) {
            let (read, _) = read_all(&bytes);
            prop_assert!(read.is_empty());
        }
    }

    #[test]
    fn a_repeated_frame_is_found() {
        let one = stream(&[vec![1, 2, 3]]);
        let (read, end) = read_all(&[one.clone(), one].concat());
        assert_eq!(read.len(), 1);
        assert!(matches!(end, WireError::Sequence { expected: 1, found: 0 }));
    }

    #[test]
    fn a_length_is_bounded_before_it_is_allocated() {
        let mut bytes = stream(&[vec![0; 8]]);
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..CHECKED_HEADER]);
        bytes[CHECKED_HEADER..CHECKED_HEADER + 4].copy_from_slice(&crc.to_le_bytes());
        let mut payload = Vec::new();
        let e = FrameReader::new(bytes.as_slice()).read(&mut payload).unwrap_err();
        assert!(matches!(e, WireError::TooLong { .. }), "{e}");
        let bytes = stream(&[vec![0; 101]]);
        let mut reader = FrameReader::new(bytes.as_slice());
        reader.set_limit(100);
        let e = reader.read(&mut payload).unwrap_err();
        assert!(matches!(e, WireError::TooLong { length: 101, limit: 100, .. }), "{e}");
        assert_eq!(payload.capacity(), 0);
    }
}
