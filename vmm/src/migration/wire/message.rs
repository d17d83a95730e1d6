//! Messages that are not pages.

use std::io::{Read, Write};
use std::ops::Range;

use memory_agent::{ByteSize, Counts};
use serde::{Deserialize, Serialize};

use super::frame::{FrameReader, FrameWriter, Kind};
use super::pages::PageBatch;
use super::{WireError, pages};
use crate::machine::{MachineDescription, MachineState};
use crate::migration::plan::ColdPolicy;

/// What the source wants to send. The first message; the destination answers with [`Message::Accept`] or
/// [`Message::Refuse`] before any page.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The machine.
    pub machine: MachineDescription,
    /// What happens to cold pages.
    pub cold: ColdPolicy,
    /// How many bytes of cold pages may be awake at a time.
    pub window: ByteSize,
}

/// What the destination says to an offer it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// Whether the destination has swap to page cold pages out to.
    pub can_page_out: bool,
}

/// Why a destination does not take a machine, or cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalReason {
    /// Too little memory, or another amount than was asked for.
    Memory,
    /// Another processor.
    Cpu,
    /// A device it does not know.
    Devices,
    /// Nothing arrived for too long.
    Connection,
    /// What arrived makes no sense.
    Stream,
    /// The host failed in the middle.
    Host,
}

/// A refusal with its sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The class.
    pub reason: RefusalReason,
    /// The sentence for people.
    pub text: String,
}

/// Every message of either side.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "a few are sent in a migration, none is kept")]
pub enum Message {
    /// Source: what I want to send.
    Offer(Offer),
    /// Destination: I take it.
    Accept(Accepted),
    /// Destination: I do not take it, or cannot go on.
    Refuse(Refusal),
    /// Source: these pages read as zeros: holes, or pages with nothing in them.
    Zeros(Vec<Range<u64>>),
    /// Source: everything of this round is sent.
    RoundEnd(u32),
    /// Destination: everything up to the end of this round has landed.
    RoundDone(u32),
    /// Source: the guest stands, this is its state; no page follows.
    State(MachineState),
    /// Destination: I have it all and I am ready.
    Ready,
    /// Source: it is yours.
    Commit,
    /// Destination: it runs here, or stands here if it stood at the source.
    Running,
    /// Destination: what was cold has been paged out; this is what guest RAM is here now. The last message.
    Settled(Counts),
    /// Source: I keep it.
    Abort(String),
}

impl Message {
    /// The name for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "offer",
            Self::Accept(_) => "accept",
            Self::Refuse(_) => "refuse",
            Self::Zeros(_) => "zeros",
            Self::RoundEnd(_) => "round end",
            Self::RoundDone(_) => "round done",
            Self::State(_) => "state",
            Self::Ready => "ready",
            Self::Commit => "commit",
            Self::Running => "running",
            Self::Settled(_) => "settled",
            Self::Abort(_) => "abort",
        }
    }

    /// Sends it.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn send(&self, writer: &mut FrameWriter<impl Write>) -> Result<(), WireError> {
        let payload = postcard::to_stdvec(self).map_err(|e| WireError::Io(std::io::Error::other(e)))?;
        writer.write(Kind::Message, &payload)
    }

    fn decode(payload: &[u8], sequence: u32) -> Result<Self, WireError> {
        postcard::from_bytes(payload)
            .map_err(|e| WireError::Payload { sequence, why: format!("not a message of version 1 ({e})") })
    }
}

/// What comes next from the source.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one exists at a time")]
pub enum Incoming {
    /// A message.
    Message(Message),
    /// Pages, whose bytes are in the payload.
    Pages(PageBatch),
}

/// Receives a message or a batch of pages of a machine with `ram_pages` pages.
///
/// # Errors
/// When the connection fails or what comes makes no sense.
pub fn receive(
    reader: &mut FrameReader<impl Read>,
    payload: &mut Vec<u8>,
    ram_pages: u64,
) -> Result<Incoming, WireError> {
    let kind = reader.read(payload)?;
    let sequence = reader.last_sequence();
    Ok(match kind {
        Kind::Message => Incoming::Message(Message::decode(payload, sequence)?),
        Kind::Pages => Incoming::Pages(pages::decode(payload, ram_pages, sequence)?),
    })
}

/// Receives a message where no pages can come.
///
/// # Errors
/// As [`receive`], and when pages come.
pub fn receive_message(reader: &mut FrameReader<impl Read>, expected: &'static str) -> Result<Message, WireError> {
    let mut payload = Vec::new();
    match receive(reader, &mut payload, 0)? {
        Incoming::Message(message) => Ok(message),
        Incoming::Pages(_) => Err(WireError::Unexpected { found: "pages", expected }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let messages = [
            Message::Accept(Accepted { can_page_out: true }),
            Message::Refuse(Refusal { reason: RefusalReason::Cpu, text: "no".into() }),
            Message::Zeros(vec![0..5, 9..10]),
            Message::RoundEnd(3),
            Message::Ready,
            Message::Abort("because".into()),
        ];
        let mut bytes = Vec::new();
        let mut writer = FrameWriter::new(&mut bytes);
        for message in &messages {
            message.send(&mut writer).unwrap();
        }
        let mut reader = FrameReader::new(bytes.as_slice());
        for message in messages {
            let received = receive_message(&mut reader, "a message").unwrap();
            assert_eq!(format!("{received:?}"), format!("{message:?}"));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(payload in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Message::decode(&payload, 0);
        }
    }
}
