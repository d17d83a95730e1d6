//! Switchover: the guest stands, the last pages and the state go over, and then it belongs to the destination.
//!
//! Two steps. Until [`Message::Ready`] arrives the source can go on, and does when anything fails. Once
//! [`Message::Commit`] has been written the destination may run the guest, so this side never does by itself again.

use std::time::Instant;

use memory_agent::SwapCounters;

use super::SourceError;
use super::session::Session;
use crate::machine::MachineState;
use crate::migration::progress::{Phase, Report, SourceResidency};
use crate::migration::wire::message::receive_message;
use crate::migration::wire::{Message, WireError};

/// The guest stands; unless it is handed over, it goes on when this is dropped.
struct Stopped<'m> {
    session: Session<'m>,
    since: Instant,
    go_on: bool,
}

/// Stops the guest and hands it over.
pub(super) fn hand_over(mut session: Session<'_>) -> Result<Report, SourceError> {
    session.enter(Phase::Switchover);
    let go_on = session.machine.is_running();
    let since = Instant::now();
    session.machine.pause();
    let mut stopped = Stopped { session, since, go_on };
    match stopped.send_rest() {
        Ok(()) => {}
        Err(e) => return Err(stopped.give_up(e)),
    }
    stopped.commit()
}

impl Stopped<'_> {
    /// The last pages, the state, and the destination's word that it has it all.
    fn send_rest(&mut self) -> Result<(), SourceError> {
        let dirty = self.session.machine.take_dirty_log()?;
        self.session.plan.written(&dirty);
        // Time presses: what is cold by now goes with the rest, and no window is paged out.
        while !self.session.plan.is_complete() {
            self.session.plan.found_awake(0..self.session.ram().pages());
            self.session.send_hot_lane(true)?;
        }
        let state = MachineState { running: self.go_on, ..self.session.machine.save()? };
        self.session.send(&Message::State(state))?;
        match self.session.receive("ready")? {
            Message::Ready => Ok(()),
            other => Err(WireError::Unexpected { found: other.name(), expected: "ready" }.into()),
        }
    }

    /// Gives the guest away.
    fn commit(mut self) -> Result<Report, SourceError> {
        if !self.session.cancel.close() {
            return Err(self.give_up(SourceError::Cancelled));
        }
        if let Err(e) = Message::Commit.send(&mut self.session.writer) {
            // Not all of the message has left, so the destination cannot have it.
            return Err(e.into());
        }
        self.go_on = false;
        let running = receive_message(&mut self.session.reader, "running");
        let downtime = self.since.elapsed();
        let total = self.session.tracker.elapsed();
        match running {
            Ok(Message::Running) => {}
            Ok(Message::Refuse(refusal)) => {
                // The destination says itself that it does not run the guest.
                self.go_on = true;
                return Err(SourceError::Refused(refusal));
            }
            Ok(other) => {
                let unexpected = WireError::Unexpected { found: other.name(), expected: "running" };
                return Err(SourceError::Unconfirmed(unexpected));
            }
            Err(e) => return Err(SourceError::Unconfirmed(e)),
        }
        self.session.enter(Phase::Settling);
        let settling = Instant::now();
        // The guest runs there whatever becomes of the connection now.
        let destination = match receive_message(&mut self.session.reader, "settled") {
            Ok(Message::Settled(counts)) => Some(counts),
            _ => None,
        };
        let session = &self.session;
        // The migration has succeeded: figures that cannot be had must not make it fail.
        let after = session.ram().counts().unwrap_or_default();
        let swaps = session.swap_before.zip(SwapCounters::read().ok()).map(|(before, now)| now.since(&before));
        Ok(Report {
            cold_policy: session.options.cold,
            classed_by: session.classed_by.to_owned(),
            total_ms: total.as_millis() as u64,
            downtime_us: downtime.as_micros() as u64,
            rounds: session.tracker.now.round,
            bytes_sent: session.writer.bytes(),
            pages: session.tracker.now.pages,
            resent: session.tracker.now.resent,
            swap_ins: swaps.map_or(0, |s| s.swap_ins),
            swap_outs: swaps.map_or(0, |s| s.swap_outs),
            source: SourceResidency {
                resident_before: session.before.resident,
                resident_peak: session.peak.max(after.resident),
                resident_after: after.resident,
                swapped_before: session.before.swapped,
                swapped_after: after.swapped,
            },
            destination,
            settle_ms: settling.elapsed().as_millis() as u64,
        })
    }

    fn give_up(mut self, error: SourceError) -> SourceError {
        // The connection may be what broke.
        let _ = Message::Abort(error.to_string()).send(&mut self.session.writer);
        error
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if self.go_on {
            self.session.machine.resume();
        }
    }
}
