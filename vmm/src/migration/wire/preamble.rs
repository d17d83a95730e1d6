//! The first bytes each side sends: who it is, which versions of the protocol it speaks, and what else it can do.
//!
//! Both sides send theirs at once and choose the same from both, without another word: the highest version that both speak, and
//! the features that both have.

use std::fmt;
use std::io::{Read, Write};

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;

/// What a Thermocline stream begins with.
pub const MAGIC: [u8; 8] = *b"THRMCLNE";
/// The versions of the protocol that this program speaks.
pub const VERSIONS: Versions = Versions { oldest: 2, newest: 2 };

/// Versions of the protocol: from the oldest to the newest, and all between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { oldest, newest } = self;
        if oldest == newest { write!(f, "version {oldest}") } else { write!(f, "versions {oldest} to {newest}") }
    }
}

/// What a program can do beside what every program of its version can: a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// Pages may be left to post-copy.
    pub const POST_COPY: Self = Self(1 << 0);
    /// All that this program knows, and can.
    pub const KNOWN: Self = Self::POST_COPY;

    /// Bits as they come, known or not.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Those of these that are among `other` as well.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other` are among these.
    pub fn has(self, other: Self) -> bool {
        self.and(other) == other
    }
}

/// What one side says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The versions that it speaks.
    pub versions: Versions,
    /// What else it can do.
    pub features: Features,
}

/// What both sides can do, and so will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The version of the protocol.
    pub version: u16,
    /// What else they may do; none that this program does not know.
    pub features: Features,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Bytes {
    magic: [u8; 8],
    oldest: U16,
    newest: U16,
    features: U64,
    /// CRC-32 of all bytes before it.
    crc: U32,
}

/// Bytes of a preamble.
pub const LENGTH: usize = size_of::<Bytes>();
/// Bytes of it that are summed.
const CHECKED: usize = LENGTH - size_of::<U32>();
/// Bytes of a preamble of version 1: its number, and zeros.
const LENGTH_1: usize = 16;

impl Preamble {
    /// This program's.
    pub const OURS: Self = Self { versions: VERSIONS, features: Features::KNOWN };

    /// As it is sent.
    pub fn to_bytes(&self) -> [u8; LENGTH] {
        let (Versions { oldest, newest }, Features(features)) = (self.versions, self.features);
        let mut bytes = Bytes {
            magic: MAGIC,
            oldest: U16::new(oldest),
            newest: U16::new(newest),
            features: U64::new(features),
            crc: U32::ZERO,
        };
        bytes.crc = U32::new(crc32fast::hash(&bytes.as_bytes()[..CHECKED]));
        zerocopy::transmute!(bytes)
    }

    /// What both sides can do.
    ///
    /// # Errors
    /// When they speak no version in common.
    pub fn agree(&self, theirs: &Self) -> Result<Agreed, WireError> {
        let version = self.versions.newest.min(theirs.versions.newest);
        if version < self.versions.oldest.max(theirs.versions.oldest) {
            return Err(WireError::Version { theirs: theirs.versions, ours: self.versions });
        }
        Ok(Agreed { version, features: self.features.and(theirs.features) })
    }

    /// Receives the other side's.
    ///
    /// # Errors
    /// When the other side is another program, or what it says of itself makes no sense.
    pub fn receive(link: &mut impl Read) -> Result<Self, WireError> {
        let mut bytes = [0; LENGTH];
        let mut have = 0;
        while have < LENGTH {
            // No more than the shortest preamble has, before it is known to be longer.
            let next = if have < LENGTH_1 { LENGTH_1 } else { LENGTH };
            // Another program may send less than this and wait: what differs is told as soon as it differs.
            match link.read(&mut bytes[have..next])? {
                0 if have == 0 => return Err(WireError::Closed),
                0 => return Err(not_thermocline(&bytes[..have])),
                n => have += n,
            }
            let magic = have.min(MAGIC.len());
            if bytes[..magic] != MAGIC[..magic] {
                return Err(not_thermocline(&bytes[..have]));
            }
            if have == LENGTH_1 && bytes[MAGIC.len()..LENGTH_1] == [1, 0, 0, 0, 0, 0, 0, 0] {
                return Ok(Self { versions: Versions { oldest: 1, newest: 1 }, features: Features::default() });
            }
        }
        let Bytes { oldest, newest, features, crc, .. } = zerocopy::transmute!(bytes);
        let versions = Versions { oldest: oldest.get(), newest: newest.get() };
        if crc.get() != crc32fast::hash(&bytes[..CHECKED]) || versions.oldest > versions.newest {
            return Err(WireError::Preamble);
        }
        Ok(Self { versions, features: Features(features.get()) })
    }
}

/// Sends our preamble.
///
/// # Errors
/// When the connection fails.
pub fn send(link: &mut impl Write) -> Result<(), WireError> {
    link.write_all(&Preamble::OURS.to_bytes())?;
    Ok(link.flush()?)
}

/// Receives the other side's preamble, and says what both can do.
///
/// # Errors
/// As [`Preamble::receive`] and [`Preamble::agree`].
pub fn receive(link: &mut impl Read) -> Result<Agreed, WireError> {
    Preamble::OURS.agree(&Preamble::receive(link)?)
}

fn not_thermocline(bytes: &[u8]) -> WireError {
    WireError::NotThermocline { began: format!("\"{}\"", bytes.escape_ascii()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn preamble() -> impl Strategy<Value = Preamble> {
        (1..9_u16, 0..9_u16, any::<u64>()).prop_map(|(oldest, more, features)| Preamble {
            versions: Versions { oldest, newest: oldest + more },
            features: Features(features),
        })
    }

    proptest! {
        /// Both sides choose the same, which both can do, and the best of that.
        #[test]
        fn both_sides_agree(one in preamble(), other in preamble()) {
            let sent = Preamble::receive(&mut one.to_bytes().as_slice()).unwrap();
            prop_assert_eq!(sent, one);
            let speaks = |side: &Preamble, version| (side.versions.oldest..=side.versions.newest).contains(&version);
            let best = (0..20).rev().find(|version| speaks(&one, *version) && speaks(&other, *version));
            match (one.agree(&other), other.agree(&one), best) {
                (Ok(mine), Ok(theirs), Some(version)) => {
                    prop_assert_eq!(mine, theirs);
                    prop_assert_eq!(mine, Agreed { version, features: Features(one.features.0 & other.features.0) });
                }
                (Err(WireError::Version { .. }), Err(WireError::Version { .. }), None) => {}
                wrong => prop_assert!(false, "{:?}", wrong),
            }
        }

        #[test]
        fn a_flipped_bit_is_found(one in preamble(), at in 0..LENGTH, bit in 0..8_u32) {
            let mut bytes = one.to_bytes();
            bytes[at] ^= 1_u8 << bit;
            let e = Preamble::receive(&mut bytes.as_slice()).unwrap_err();
            let expected = if at < MAGIC.len() {
                matches!(e, WireError::NotThermocline { .. })
            } else {
                matches!(e, WireError::Preamble)
            };
            prop_assert!(expected, "{}", e);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = receive(&mut [&MAGIC[..], &bytes].concat().as_slice());
        }
    }

    #[test]
    fn features_that_are_not_known_are_not_used() {
        let theirs = Preamble { versions: VERSIONS, features: Features(u64::MAX) };
        assert_eq!(receive(&mut theirs.to_bytes().as_slice()).unwrap().features, Features::KNOWN);
    }

    #[test]
    fn another_program_and_another_version_are_told_apart() {
        let e = receive(&mut &b"SSH-2.0-OpenSSH_9.2\r\n"[..]).unwrap_err();
        assert!(matches!(&e, WireError::NotThermocline { began } if began.contains("SSH-2.0")), "{e}");
        let newer = Preamble { versions: Versions { oldest: 98, newest: 99 }, ..Preamble::OURS };
        let e = receive(&mut newer.to_bytes().as_slice()).unwrap_err();
        assert!(e.to_string().contains("versions 98 to 99"), "{e}");
        assert!(matches!(receive(&mut &b""[..]), Err(WireError::Closed)));
        assert!(matches!(receive(&mut &b"THR"[..]), Err(WireError::NotThermocline { .. })));
    }

    #[test]
    fn version_1_is_told_as_such_and_sees_another_version() {
        // All that it sends: it waits for an answer behind that.
        let first = b"THRMCLNE\x01\0\0\0\0\0\0\0";
        let e = receive(&mut first.chain(std::io::repeat(b'.'))).unwrap_err();
        assert!(matches!(e, WireError::Version { theirs: Versions { oldest: 1, newest: 1 }, ours: VERSIONS }), "{e}");
        // It reads so many bytes and takes these two for a version.
        let ours = Preamble::OURS.to_bytes();
        assert!(ours.starts_with(&MAGIC) && ours[8..10] == 2_u16.to_le_bytes());
    }
}
