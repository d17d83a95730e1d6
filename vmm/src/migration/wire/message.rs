//! Messages that are not pages.

use std::io::{Read, Write};
use std::ops::Range;

use memory_agent::{ByteSize, Counts};
use serde::{Deserialize, Serialize};

use super::frame::{Frame, FrameReader, FrameWriter, Kind};
use super::join::{Attempt, Channel, MigrationId};
use super::pages::PageBatch;
use super::{WireError, pages};
use crate::machine::{MachineSpec, MachineState};
use crate::migration::downtime::Steps;
use crate::migration::plan::ColdPolicy;
use crate::migration::progress::FaultFigures;
use crate::ram::RamPage;

/// What the source wants to send. The first message; the destination answers with [`Message::Accept`] or
/// [`Message::Refuse`] before any page.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The machine.
    pub machine: MachineSpec,
    /// What happens to cold pages.
    pub cold: ColdPolicy,
    /// How many bytes of cold pages may be resident at a time.
    pub window: ByteSize,
    /// What the migration is called, by further connections and in both logs.
    pub id: MigrationId,
    /// Whether pages may be left to post-copy.
    pub post_copy: bool,
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
    /// It takes another machine, or has taken one.
    Busy,
}

/// A refusal with its sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The class.
    pub reason: RefusalReason,
    /// The sentence for people.
    pub text: String,
}

impl Refusal {
    /// For a connection that failed, or over which something came that makes no sense.
    pub fn of_wire(error: &WireError) -> Self {
        let reason = match error {
            WireError::Io(_) | WireError::Closed | WireError::Silent => RefusalReason::Connection,
            _ => RefusalReason::Stream,
        };
        Self { reason, text: error.to_string() }
    }
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
    Zeros(Vec<Range<RamPage>>),
    /// Source: everything of this round is sent.
    RoundEnd(u32),
    /// Destination: everything up to the end of this round has landed.
    RoundDone(u32),
    /// Source: the guest is paused, this is its state; no page follows.
    State(MachineState),
    /// Destination: I have it all and I am ready.
    Ready,
    /// Source: it is yours.
    Commit,
    /// Destination: it runs here, or is paused here if it was at the source; and how long what it did for that took.
    Running(Steps),
    /// Destination: what was cold has been paged out; this is what guest RAM is here now. The last message.
    PagedOut(Counts),
    /// Source: I keep it.
    Abort(String),
    /// Whoever makes a further connection: it belongs to this migration. The first message on it.
    Join(MigrationId, Channel, Attempt),
    /// The answer to that.
    Joined,
    /// Source: these pages are outstanding: they come by post-copy, and what you have of them is out of date.
    Outstanding(Vec<Range<RamPage>>),
    /// Destination, on the fault channel: the guest waits for these.
    PageRequest(Vec<Range<RamPage>>),
    /// Destination: these have landed, and are not needed at the source any more.
    Landed(Vec<Range<RamPage>>),
    /// Destination, first on a connection that goes on with a broken one: these are missing, and whether that is all.
    Missing(Vec<Range<RamPage>>, bool),
    /// Source: all pages have been confirmed.
    PostCopyEnd,
    /// Destination: how long the guest waited for pages.
    Served(FaultFigures),
    /// Destination: the guest has ended, and needs nothing any more.
    Ended,
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
            Self::Running(_) => "running",
            Self::PagedOut(_) => "paged out",
            Self::Abort(_) => "abort",
            Self::Join(..) => "join",
            Self::Joined => "joined",
            Self::Outstanding(_) => "outstanding",
            Self::PageRequest(_) => "page request",
            Self::Landed(_) => "landed",
            Self::Missing(..) => "missing",
            Self::PostCopyEnd => "post-copy end",
            Self::Served(_) => "served",
            Self::Ended => "ended",
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
    Incoming::decode(Frame { sequence: reader.last_sequence(), kind, payload }, ram_pages)
}

impl Incoming {
    /// What a frame holds, for a machine with `ram_pages` pages.
    ///
    /// # Errors
    /// When it makes no sense.
    pub fn decode(Frame { sequence, kind, payload }: Frame<'_>, ram_pages: u64) -> Result<Self, WireError> {
        Ok(match kind {
            Kind::Message => Self::Message(Message::decode(payload, sequence)?),
            Kind::Pages => Self::Pages(pages::decode(payload, ram_pages, sequence)?),
        })
    }
}

/// Most ranges in one message.
const MAX_RANGES: usize = 4096;

/// Ranges in as many messages as they need: `message` makes one of some of them, and hears whether these are the last.
/// Without any there is one message of none.
///
/// # Errors
/// When the connection fails.
pub fn send_ranges(
    ranges: &[Range<RamPage>],
    writer: &mut FrameWriter<impl Write>,
    message: impl Fn(Vec<Range<RamPage>>, bool) -> Message,
) -> Result<(), WireError> {
    let mut rest = ranges;
    loop {
        let (some, behind) = rest.split_at(rest.len().min(MAX_RANGES));
        message(some.to_vec(), behind.is_empty()).send(writer)?;
        if behind.is_empty() {
            return Ok(());
        }
        rest = behind;
    }
}

/// Ranges as they came, of a machine with `ram_pages` pages: in order and apart, so that what a message asks for is never
/// more work than all of RAM once.
///
/// # Errors
/// When one is not all RAM, or does not lie behind the one before it, or there are more than a message may have.
pub fn check_ranges(ranges: &[Range<RamPage>], ram_pages: u64, sequence: u32) -> Result<(), WireError> {
    let wrong = |why| Err(WireError::Payload { sequence, why });
    if ranges.len() > MAX_RANGES {
        return wrong(format!("{} ranges of pages, {MAX_RANGES} are possible", ranges.len()));
    }
    let mut from = RamPage(0);
    for Range { start, end } in ranges.iter().cloned() {
        if start > end || end > RamPage(ram_pages) {
            return wrong(format!("pages {start} to {end}, of {ram_pages}"));
        }
        if start < from {
            return wrong(format!("pages {start} to {end} behind others up to {from}"));
        }
        from = end;
    }
    Ok(())
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
    use memory_agent::PageNumber;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let messages = [
            Message::Accept(Accepted { can_page_out: true }),
            Message::Refuse(Refusal { reason: RefusalReason::Cpu, text: "no".into() }),
            Message::Zeros(vec![RamPage(0).run(5), RamPage(9).run(1)]),
            Message::RoundEnd(3),
            Message::Ready,
            Message::Abort("because".into()),
            Message::Join(MigrationId::from_bytes([7; 16]), Channel::Faults, Attempt::default()),
            Message::Outstanding(vec![RamPage(3).run(1)]),
            Message::Missing(vec![RamPage(1).run(1), RamPage(8).run(72)], false),
            Message::PostCopyEnd,
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

    #[test]
    fn pages_are_numbers_on_the_wire() {
        let zeros = Message::Zeros(vec![RamPage(0)..RamPage(5), RamPage(9)..RamPage(300)]);
        assert_eq!(postcard::to_stdvec(&zeros).unwrap(), [3, 2, 0, 5, 9, 0xac, 2]);
        let status = serde_json::to_string(&(RamPage(7), RamPage(7)..RamPage(9))).unwrap();
        assert_eq!(status, r#"[7,{"start":7,"end":9}]"#);
    }

    #[test]
    fn ranges_lie_in_ram_in_order_and_apart() {
        let ranges = |ranges: &[(u64, u64)]| -> Vec<Range<RamPage>> {
            ranges.iter().map(|(start, end)| RamPage(*start)..RamPage(*end)).collect()
        };
        assert!(check_ranges(&ranges(&[(0, 5), (5, 6), (9, 9), (10, 100)]), 100, 0).is_ok());
        let many: Vec<_> = (0..=MAX_RANGES as u64).map(|page| RamPage(page).run(1)).collect();
        assert!(check_ranges(&many[1..], u64::MAX, 0).is_ok());
        let pairs: [&[(u64, u64)]; 4] = [&[(0, 101)], &[(9, 3)], &[(0, 100), (0, 100)], &[(5, 6), (0, 1)]];
        for wrong in pairs.map(ranges).into_iter().chain([many]) {
            assert!(matches!(check_ranges(&wrong, 100, 7), Err(WireError::Payload { sequence: 7, .. })), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(payload in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Message::decode(&payload, 0);
        }
    }
}
