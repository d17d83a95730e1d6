//! Bytes on the wire, and nothing else: `docs/protocol.md` describes them.

pub mod frame;
mod join;
pub mod message;
pub mod pages;
pub mod preamble;

pub use frame::{Frame, FrameBuffer, FrameReader, FrameWriter, Kind};
pub use join::{Attempt, Channel, MigrationId};
pub use message::{Accepted, Message, Offer, Refusal, RefusalReason};
pub use pages::{Lane, PageBatch};
pub use preamble::{Agreed, Features, Preamble, VERSIONS, Versions};

use std::io;

/// Most pages in one batch: few enough that a batch is still in the processor's cache when it is written to guest RAM.
pub const MAX_BATCH_PAGES: usize = 64;
/// Most bytes in the payload of a message that is not pages.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Most bytes in the payload of the first message of a connection, which anybody may send.
pub const MAX_INTRODUCTION: usize = 256 << 10;

/// Why the other side's bytes make no sense, or do not come.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(io::Error),
    /// The connection ended in the middle.
    #[error("the connection ended before the migration did")]
    Closed,
    /// Nothing came for too long.
    #[error("the other side has been silent for too long")]
    Silent,
    /// The other side is not Thermocline.
    #[error("the other side is not a Thermocline migration: it began with {began}; check the address")]
    NotThermocline {
        /// Its first bytes, printable.
        began: String,
    },
    /// The other side speaks other versions.
    #[error(
        "the other side speaks {theirs} of the migration protocol, this program {ours}; use the same release on both hosts, or releases that have a version in common"
    )]
    Version {
        /// Theirs.
        theirs: Versions,
        /// Ours.
        ours: Versions,
    },
    /// What the other side says of itself.
    #[error("the stream is garbled: the preamble has a wrong checksum, or versions that cannot be")]
    Preamble,
    /// A frame does not begin like one.
    #[error("the stream is garbled: frame {sequence} has a wrong header")]
    Header {
        /// Number of the frame.
        sequence: u32,
    },
    /// A frame that was not expected next: repeated, left out or out of order.
    #[error("the stream is out of order: frame {found} came where frame {expected} should be")]
    Sequence {
        /// The number that should come.
        expected: u32,
        /// The number that came.
        found: u32,
    },
    /// A payload whose checksum is wrong.
    #[error("the stream is garbled: frame {sequence} has a wrong checksum")]
    Checksum {
        /// Number of the frame.
        sequence: u32,
    },
    /// A frame longer than its kind may be.
    #[error("frame {sequence} claims {length} bytes, {limit} are possible")]
    TooLong {
        /// Number of the frame.
        sequence: u32,
        /// What it claims.
        length: u64,
        /// The bound.
        limit: usize,
    },
    /// A payload of a version this program does not know.
    #[error("frame {sequence} is of kind {kind} version {version}, which this program does not know")]
    Unknown {
        /// Number of the frame.
        sequence: u32,
        /// Its kind.
        kind: u16,
        /// Its version.
        version: u16,
    },
    /// A payload that is not what its kind says.
    #[error("frame {sequence} makes no sense: {why}")]
    Payload {
        /// Number of the frame.
        sequence: u32,
        /// What is wrong.
        why: String,
    },
    /// A message that does not belong here.
    #[error("the other side sent '{found}' where {expected} should come")]
    Unexpected {
        /// What came.
        found: &'static str,
        /// What should have.
        expected: &'static str,
    },
}

impl From<io::Error> for WireError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Io(e),
        }
    }
}
