//! The side that receives. [`receive`] reads like the script it is.

mod error;
mod keeper;
mod landing;
mod tail;

use std::io::Read;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use error::DestinationError;
use landing::{Landed, Landing};
use tail::Receiver;
pub use tail::{Tail, TailStatus};

use super::DestinationMachine;
use super::cancel::Cancel;
use super::link::{Address, Link, Listener};
use super::plan::ColdPolicy;
use super::rendezvous::{Channel, Rendezvous};
use super::wire::message::{Incoming, check_ranges, receive as receive_frame, receive_message};
use super::wire::{Accepted, FrameReader, FrameWriter, Message, Offer, Refusal, RefusalReason, WireError, preamble};
use crate::machine::MachineState;
use crate::ram::why_no_faults;

/// How long to wait for the source to hear a refusal before the connection is closed.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long the source may take for its second connection.
const SECOND_CONNECTION: Duration = Duration::from_secs(10);

/// How a source that was lost comes back while its pages follow the guest.
#[derive(Debug)]
pub struct Door {
    /// Where it connects: listened on from the moment that pages are to follow.
    pub address: Option<Address>,
    /// How long it may stay away before it is taken for lost, and the guest is stopped.
    pub patience: Duration,
}

/// Receives a machine over `link`. `prepare` makes it from the offer, or says why not. When this returns `Ok`, the guest
/// runs here and belongs here; when it fails, the guest has never run here. `door` is where the source connects again when
/// pages follow the guest; otherwise nobody is listened to any more, so that who comes later knows at once.
///
/// # Errors
/// What went wrong, as a sentence for people. The source has been told.
pub fn receive<M: DestinationMachine>(
    link: Link,
    door: Door,
    cancel: &Cancel,
    prepare: impl FnOnce(&Offer) -> Result<M, Refusal>,
) -> Result<Arrived<M>, DestinationError> {
    cancel.watch(&link);
    let mut reader = FrameReader::new(link.try_clone().map_err(WireError::from)?);
    let mut writer = FrameWriter::new(link);
    let arrived = take(&mut reader, &mut writer, door, cancel, prepare);
    match arrived {
        Ok((machine, cold, landed, receiver)) => Ok(Arrived { machine, cold, landed, receiver, reader, writer }),
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
    landed: Landed,
    receiver: Option<Receiver>,
    reader: FrameReader<Link>,
    writer: FrameWriter<Link>,
}

impl<M: DestinationMachine> Arrived<M> {
    /// Receives what follows the guest, pages out what was cold and has not been paged out yet, tells the source how it ended,
    /// and gives the machine.
    pub fn settle(self) -> M {
        let started = Instant::now();
        let mut writer = match self.receiver {
            None => Some(self.writer),
            Some(receiver) => {
                let (figures, mut writer) = receiver.run(&self.machine, (self.reader, self.writer));
                tracing::info!(?figures, took = ?started.elapsed(), "all pages have come");
                if let Some(writer) = &mut writer {
                    let _ = Message::Served(figures).send(writer);
                }
                writer
            }
        };
        match self.landed.settle(self.machine.ram()) {
            Ok(report) => {
                tracing::info!(policy = ?self.cold, took = ?started.elapsed(), left = report.left, "settled");
            }
            Err(e) => tracing::warn!("cold pages stay in memory here: {e}"),
        }
        if let (Ok(counts), Some(writer)) = (self.machine.ram().counts(), &mut writer) {
            // The source may have gone; it needs nothing from us any more.
            let _ = Message::Settled(counts).send(writer);
        }
        self.machine
    }

    /// The machine, running.
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// What follows it, if anything does.
    pub fn tail(&self) -> Option<Arc<Tail>> {
        self.receiver.as_ref().map(|receiver| Arc::clone(receiver.tail()))
    }
}

fn take<M: DestinationMachine>(
    reader: &mut FrameReader<Link>,
    writer: &mut FrameWriter<Link>,
    door: Door,
    cancel: &Cancel,
    prepare: impl FnOnce(&Offer) -> Result<M, Refusal>,
) -> Result<(M, ColdPolicy, Landed, Option<Receiver>), DestinationError> {
    preamble::send(writer.link())?;
    preamble::receive(reader.link())?;
    let offer = match receive_message(reader, "offer")? {
        Message::Offer(offer) => offer,
        other => return Err(unexpected(&other, "offer")),
    };
    if let Some(e) = offer.session.and_then(|_| why_no_faults()) {
        return Err(DestinationError::Refused(Refusal { reason: RefusalReason::Host, text: e.to_string() }));
    }
    let machine = prepare(&offer).map_err(DestinationError::Refused)?;
    let rendezvous = offer.session.map(|session| Arc::new(Rendezvous::new(session)));
    let patience = door.patience;
    let listener = rendezvous.as_ref().and(door.address).map(|address| Listener::bind(&address)).transpose()?;
    let door = rendezvous.as_ref().zip(listener).map(|(r, listener)| tail::open_door(r, listener)).transpose()?;
    let can_page_out = memory_agent::active().is_ok_and(|swaps| !swaps.is_empty());
    Message::Accept(Accepted { can_page_out }).send(writer)?;
    let faults = rendezvous.as_ref().map(|r| r.take(Channel::Faults, SECOND_CONNECTION).ok_or(WireError::Silent));
    let faults = faults.transpose()?;
    let (state, (landed, later)) = std::thread::scope(|scope| {
        let mut landing = Landing::new(scope, machine.ram(), offer.window, can_page_out)?;
        let state = copy(reader, writer, &mut landing, faults.is_some())?;
        Ok::<_, DestinationError>((state, landing.finish()?))
    })?;
    let receiver = match (rendezvous, faults) {
        (Some(rendezvous), Some(faults)) => {
            rendezvous.adopt(Channel::Bulk, writer.link());
            Some(Receiver::start(machine.ram(), &rendezvous, (door, patience), (&landed, later), faults)?)
        }
        _ => None,
    };
    // The kernel may touch guest memory here, and waits for what has not come.
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
    Ok((machine, offer.cold, landed, receiver))
}

/// Everything up to the machine's state: pages, zeros and the ends of rounds.
fn copy(
    reader: &mut FrameReader<Link>,
    writer: &mut FrameWriter<Link>,
    landing: &mut Landing<'_>,
    follows: bool,
) -> Result<MachineState, DestinationError> {
    loop {
        let mut payload = landing.buffer();
        match receive_frame(reader, &mut payload, landing.pages())? {
            Incoming::Pages(batch) => landing.land(batch, payload)?,
            Incoming::Message(Message::Zeros(ranges)) => {
                check_ranges(&ranges, landing.pages(), reader.last_sequence())?;
                landing.zeros(&ranges)?;
            }
            Incoming::Message(Message::Later(ranges)) if follows => {
                check_ranges(&ranges, landing.pages(), reader.last_sequence())?;
                landing.later(&ranges)?;
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
        DestinationError::Machine(e) if e.is_of_state() => {
            Refusal { reason: RefusalReason::Stream, text: error.to_string() }
        }
        _ => Refusal { reason: RefusalReason::Host, text: error.to_string() },
    };
    if Message::Refuse(refusal).send(writer).is_err() {
        return;
    }
    writer.link().shutdown(Shutdown::Write);
    reader.link().set_deadline(Some(Instant::now() + LAST_WORDS));
    let mut rest = vec![0; 1 << 16];
    while let Ok(1..) = reader.link().read(&mut rest) {}
}
