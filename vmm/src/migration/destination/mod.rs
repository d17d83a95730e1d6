//! The side that receives. [`Reception`] listens and takes the machine that is offered; what it does then, in `take`, reads like
//! the script it is.

mod cold_window;
mod error;
mod landing;
mod postcopy;
mod reception;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use error::DestinationError;
use landing::{Landed, Landing};
use memory_agent::ByteSize;
use postcopy::Receiver;
pub use postcopy::{PostCopy, PostCopyStatus};
pub use reception::{Arrival, Reception, Terms};

use super::DestinationMachine;
use super::cancel::Cancel;
use super::channels::Channels;
use super::downtime::Steps;
use super::link::Link;
use super::listening::refuse;
use super::plan::ColdPolicy;
use super::wire::message::{Incoming, check_ranges, receive as receive_frame, receive_message};
use super::wire::{Accepted, Channel, FrameReader, FrameWriter, Message, Offer, Refusal, RefusalReason, WireError};
use crate::machine::MachineState;
use crate::ram::why_no_faults;
use crate::stopwatch::Work;

/// How long the source may take for its second connection.
const SECOND_CONNECTION: Duration = Duration::from_secs(10);

/// A machine that can be here, and over what it comes.
struct Expected<M> {
    machine: Arc<M>,
    cold: ColdPolicy,
    window: ByteSize,
    /// Where further connections come in, if pages may be left to post-copy.
    channels: Option<Arc<Channels>>,
    reader: FrameReader<Link>,
    writer: FrameWriter<Link>,
}

/// Makes the machine that is offered, or says why it cannot be here.
fn prepare<M>(
    offer: &Offer,
    prepare: impl FnOnce(&Offer) -> Result<M, Refusal>,
) -> Result<(Arc<M>, Option<Arc<Channels>>), Refusal> {
    if let Some(e) = why_no_faults().filter(|_| offer.post_copy) {
        return Err(Refusal { reason: RefusalReason::Host, text: e.to_string() });
    }
    let machine = prepare(offer)?;
    Ok((Arc::new(machine), offer.post_copy.then(|| Arc::new(Channels::new(offer.id)))))
}

/// Receives a machine whose offer can be taken. When this returns `Ok`, the guest runs here and belongs here; when it fails, the
/// guest has never run here, and the source has been told. `is_gone` is called before that, once nothing of the guest is left: who
/// comes next need not wait until the source has heard why. A source of a post-copy migration may stay away for `source_timeout`.
fn receive<M: DestinationMachine>(
    expected: Expected<M>,
    source_timeout: Duration,
    cancel: &Cancel,
    is_gone: impl FnOnce(),
) -> Result<Arrived<M>, DestinationError> {
    let Expected { machine, cold, window, channels, mut reader, mut writer } = expected;
    cancel.watch(writer.link());
    match take(machine, window, channels, &mut reader, &mut writer, source_timeout, cancel) {
        Ok((machine, landed, receiver)) => Ok(Arrived { machine, cold, landed, receiver, reader, writer }),
        Err(e) => {
            let error = if cancel.is_cancelled() { DestinationError::Cancelled } else { e };
            cancel.forget();
            is_gone();
            if let Some(refusal) = error.refusal() {
                refuse(&mut reader, &mut writer, refusal);
            }
            Err(error)
        }
    }
}

/// A machine that has arrived and runs.
struct Arrived<M> {
    machine: Arc<M>,
    cold: ColdPolicy,
    landed: Landed,
    receiver: Option<Receiver>,
    reader: FrameReader<Link>,
    writer: FrameWriter<Link>,
}

impl<M: DestinationMachine> Arrived<M> {
    /// Receives what is left to post-copy, pages out what was cold and has not been paged out yet, and tells the source how it
    /// ended.
    fn page_out_rest(self) {
        let started = Instant::now();
        let mut writer = match self.receiver {
            None => Some(self.writer),
            Some(receiver) => {
                let (figures, mut writer) = receiver.run(self.machine.as_ref(), (self.reader, self.writer));
                tracing::info!(?figures, took = ?started.elapsed(), "all pages have come");
                if let Some(writer) = &mut writer {
                    let _ = Message::Served(figures).send(writer);
                }
                writer
            }
        };
        match self.landed.page_out_rest(self.machine.ram()) {
            Ok(report) => {
                tracing::info!(policy = ?self.cold, took = ?started.elapsed(), left = report.left, "paged out");
            }
            Err(e) => tracing::warn!("cold pages stay in memory here: {e}"),
        }
        if let (Ok(counts), Some(writer)) = (self.machine.ram().counts(), &mut writer) {
            // The source may have gone; it needs nothing from us any more.
            let _ = Message::PagedOut(counts).send(writer);
        }
    }

    /// Post-copy, if there is any.
    fn post_copy(&self) -> Option<Arc<PostCopy>> {
        self.receiver.as_ref().map(|receiver| Arc::clone(receiver.post_copy()))
    }
}

/// From our taking the machine to its running here.
fn take<M: DestinationMachine>(
    machine: Arc<M>,
    window: ByteSize,
    channels: Option<Arc<Channels>>,
    reader: &mut FrameReader<Link>,
    writer: &mut FrameWriter<Link>,
    source_timeout: Duration,
    cancel: &Cancel,
) -> Result<(Arc<M>, Landed, Option<Receiver>), DestinationError> {
    let can_page_out = memory_agent::active().is_ok_and(|swaps| !swaps.is_empty());
    Message::Accept(Accepted { can_page_out }).send(writer)?;
    let faults = channels.as_ref().map(|r| r.take(Channel::Faults, SECOND_CONNECTION).ok_or(WireError::Silent));
    let faults = faults.transpose()?;
    let ((state, came), (landed, later)) = std::thread::scope(|scope| {
        let mut landing = Landing::new(scope, machine.ram(), window, can_page_out)?;
        let state = copy(reader, writer, &mut landing, faults.is_some())?;
        Ok::<_, DestinationError>((state, landing.finish()?))
    })?;
    let receiver = match (channels, faults) {
        (Some(channels), Some(faults)) => {
            channels.adopt(Channel::Bulk, writer.link());
            Some(Receiver::start(machine.as_ref(), &channels, source_timeout, (&landed, later), faults)?)
        }
        _ => None,
    };
    let mut steps = Steps::default();
    steps.add_ram(Work::Land, came);
    // The kernel may touch guest memory here, and waits for what has not come.
    let restored = machine.restore(&state);
    if let Some(receiver) = &receiver {
        receiver.restored()?;
    }
    restored?;
    machine.take_over()?;
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
    steps.extend(machine.take_steps());
    let _ = Message::Running(steps).send(writer);
    Ok((machine, landed, receiver))
}

/// Everything up to the machine's state, and when that came: pages, zeros and the ends of rounds.
fn copy(
    reader: &mut FrameReader<Link>,
    writer: &mut FrameWriter<Link>,
    landing: &mut Landing<'_>,
    follows: bool,
) -> Result<(MachineState, Instant), DestinationError> {
    loop {
        let mut payload = landing.buffer();
        match receive_frame(reader, &mut payload, landing.pages())? {
            Incoming::Pages(batch) => landing.land(batch, payload)?,
            Incoming::Message(Message::Zeros(ranges)) => {
                check_ranges(&ranges, landing.pages(), reader.last_sequence())?;
                landing.zeros(&ranges)?;
            }
            Incoming::Message(Message::Outstanding(ranges)) if follows => {
                check_ranges(&ranges, landing.pages(), reader.last_sequence())?;
                landing.later(&ranges)?;
            }
            Incoming::Message(Message::RoundEnd(round)) => {
                landing.drain()?;
                Message::RoundDone(round).send(writer)?;
            }
            Incoming::Message(Message::State(state)) => {
                let came = Instant::now();
                landing.drain()?;
                landing.check_complete()?;
                return Ok((state, came));
            }
            Incoming::Message(Message::Abort(why)) => return Err(DestinationError::Aborted(why)),
            Incoming::Message(other) => return Err(unexpected(&other, "pages or state")),
        }
    }
}

fn unexpected(found: &Message, expected: &'static str) -> DestinationError {
    WireError::Unexpected { found: found.name(), expected }.into()
}
