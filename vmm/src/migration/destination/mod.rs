//! The side that receives. [`receive`] reads like the script it is.

mod error;
mod keeper;
mod landing;

use std::io::Read;
use std::net::Shutdown;
use std::time::{Duration, Instant};

pub use error::DestinationError;
use landing::Landing;

use super::DestinationMachine;
use super::cancel::Cancel;
use super::link::Link;
use super::plan::ColdPolicy;
use super::wire::message::{Incoming, receive as receive_frame, receive_message};
use super::wire::{Accepted, FrameReader, FrameWriter, Message, Offer, Refusal, RefusalReason, WireError, preamble};
use crate::machine::MachineState;

/// How long to wait for the source to hear a refusal before the connection is closed.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Receives a machine over `link`. `prepare` makes it from the offer, or says why not. When this returns `Ok`, the guest
/// runs here and belongs here; when it fails, the guest has never run here.
///
/// # Errors
/// What went wrong, as a sentence for people. The source has been told.
pub fn receive<M: DestinationMachine>(
    link: Link,
    cancel: &Cancel,
    prepare: impl FnOnce(&Offer) -> Result<M, Refusal>,
) -> Result<Arrived<M>, DestinationError> {
    cancel.watch(&link);
    let mut reader = FrameReader::new(link.try_clone().map_err(WireError::from)?);
    let mut writer = FrameWriter::new(link);
    let arrived = take(&mut reader, &mut writer, cancel, prepare);
    match arrived {
        Ok((machine, cold, landing)) => Ok(Arrived { machine, cold, landing, writer }),
        Err(_) if cancel.is_cancelled() => Err(DestinationError::Cancelled),
        Err(e) => {
            refuse(&mut reader, &mut writer, &e);
            Err(e)
        }
    }
}

/// A machine that has arrived and runs.
pub struct Arrived<M> {
    machine: M,
    cold: ColdPolicy,
    landing: landing::Landed,
    writer: FrameWriter<Link>,
}

impl<M: DestinationMachine> Arrived<M> {
    /// Pages out what was cold and has not been paged out yet, tells the source how it ended, and gives the machine.
    pub fn settle(mut self) -> M {
        let started = Instant::now();
        match self.landing.settle(self.machine.ram()) {
            Ok(report) => {
                tracing::info!(policy = ?self.cold, took = ?started.elapsed(), left = report.left, "settled");
            }
            Err(e) => tracing::warn!("cold pages stay in memory here: {e}"),
        }
        if let Ok(counts) = self.machine.ram().counts() {
            // The source may have gone; it needs nothing from us any more.
            let _ = Message::Settled(counts).send(&mut self.writer);
        }
        self.machine
    }

    /// The machine, running.
    pub fn machine(&self) -> &M {
        &self.machine
    }
}

fn take<M: DestinationMachine>(
    reader: &mut FrameReader<Link>,
    writer: &mut FrameWriter<Link>,
    cancel: &Cancel,
    prepare: impl FnOnce(&Offer) -> Result<M, Refusal>,
) -> Result<(M, ColdPolicy, landing::Landed), DestinationError> {
    preamble::send(writer.link())?;
    preamble::receive(reader.link())?;
    let offer = match receive_message(reader, "offer")? {
        Message::Offer(offer) => offer,
        other => return Err(unexpected(&other, "offer")),
    };
    let machine = prepare(&offer).map_err(DestinationError::Refused)?;
    let can_page_out = memory_agent::active().is_ok_and(|swaps| !swaps.is_empty());
    Message::Accept(Accepted { can_page_out }).send(writer)?;
    let (state, landed) = std::thread::scope(|scope| {
        let mut landing = Landing::new(scope, machine.ram(), offer.window, can_page_out)?;
        let state = copy(reader, writer, &mut landing)?;
        Ok::<_, DestinationError>((state, landing.finish()?))
    })?;
    machine.restore(&state)?;
    Message::Ready.send(writer)?;
    match receive_message(reader, "commit")? {
        Message::Commit => {}
        Message::Abort(why) => return Err(DestinationError::Aborted(why)),
        other => return Err(unexpected(&other, "commit")),
    }
    // From here on the guest is ours, whatever happens to the connection or to whoever would cancel.
    cancel.close();
    if state.running {
        machine.resume();
    }
    let _ = Message::Running.send(writer);
    Ok((machine, offer.cold, landed))
}

/// Everything up to the machine's state: pages, zeros and the ends of rounds.
fn copy(
    reader: &mut FrameReader<Link>,
    writer: &mut FrameWriter<Link>,
    landing: &mut Landing<'_>,
) -> Result<MachineState, DestinationError> {
    loop {
        let mut payload = landing.buffer();
        match receive_frame(reader, &mut payload, landing.pages())? {
            Incoming::Pages(batch) => landing.land(batch, payload)?,
            Incoming::Message(Message::Zeros(ranges)) => {
                let all = landing.pages();
                if let Some(range) = ranges.iter().find(|range| range.start > range.end || range.end > all) {
                    let why = format!("zeros in pages {} to {}, of {all}", range.start, range.end);
                    return Err(WireError::Payload { sequence: reader.last_sequence(), why }.into());
                }
                landing.zeros(&ranges)?;
            }
            Incoming::Message(Message::RoundEnd(round)) => {
                landing.drain()?;
                Message::RoundDone(round).send(writer)?;
            }
            Incoming::Message(Message::State(state)) => {
                landing.drain()?;
                landing.check_complete()?;
                return Ok(state);
            }
            Incoming::Message(Message::Abort(why)) => return Err(DestinationError::Aborted(why)),
            Incoming::Message(other) => return Err(unexpected(&other, "pages or state")),
        }
    }
}

fn unexpected(found: &Message, expected: &'static str) -> DestinationError {
    WireError::Unexpected { found: found.name(), expected }.into()
}

/// Tells the source why, and waits until it has had time to read it: closing a TCP connection with unread data would
/// throw the message away.
fn refuse(reader: &mut FrameReader<Link>, writer: &mut FrameWriter<Link>, error: &DestinationError) {
    let refusal = match error {
        DestinationError::Aborted(_) | DestinationError::Cancelled => return,
        DestinationError::Refused(refusal) => refusal.clone(),
        DestinationError::Wire(WireError::Io(_) | WireError::Closed | WireError::Silent) => {
            Refusal { reason: RefusalReason::Connection, text: error.to_string() }
        }
        DestinationError::Wire(_) => Refusal { reason: RefusalReason::Stream, text: error.to_string() },
        _ => Refusal { reason: RefusalReason::Host, text: error.to_string() },
    };
    if Message::Refuse(refusal).send(writer).is_err() {
        return;
    }
    writer.link().shutdown(Shutdown::Write);
    let deadline = Instant::now() + LAST_WORDS;
    let mut rest = vec![0; 1 << 16];
    while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        if reader.link().set_read_limit(left).is_err() || !matches!(reader.link().read(&mut rest), Ok(1..)) {
            break;
        }
    }
}
