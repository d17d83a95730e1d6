//! Switchover: the guest stands, the last pages and the state go over, and then it belongs to the destination.
//!
//! Two steps. Until [`Message::Ready`] arrives the source can go on, and does when anything fails. Once
//! [`Message::Commit`] has been written the destination may run the guest, so this side never does by itself again.
//! Where pages follow the guest ([`super::tail`]), they are kept here until then, whole, whoever has asked for some.

use std::time::Instant;

use memory_agent::{PAGE_SIZE, SwapCounters};

use super::session::Session;
use super::tail::{Followed, Follower};
use super::{SourceError, Switchover};
use crate::machine::MachineState;
use crate::migration::plan::{ColdPolicy, Owed};
use crate::migration::progress::{Phase, Report, SourceResidency, TailReport};
use crate::migration::wire::message::{receive_message, send_ranges};
use crate::migration::wire::{FrameReader, FrameWriter, Message, WireError};

/// The guest stands; unless it is handed over, it goes on when this is dropped.
struct Stopped<'m> {
    session: Session<'m>,
    since: Instant,
    go_on: bool,
    /// What follows the guest, if anything may.
    follower: Option<Follower>,
}

/// Stops the guest and hands it over.
pub(super) fn hand_over(mut session: Session<'_>) -> Result<Report, SourceError> {
    session.enter(Phase::Switchover);
    let go_on = session.machine.is_running();
    let since = Instant::now();
    session.machine.pause();
    let mut stopped = Stopped { session, since, go_on, follower: None };
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
        let options = self.session.options;
        if options.switchover == Switchover::Converged {
            let cold_follows = options.cold == ColdPolicy::Lazy;
            // Time presses: what is cold by now goes with the rest, and no window is paged out. Unless it may follow.
            while self.session.plan.owed().hot > 0 || !cold_follows && !self.session.plan.is_complete() {
                if !cold_follows {
                    self.session.plan.found_awake(0..self.session.ram().pages());
                }
                self.session.send_hot_lane(!cold_follows)?;
            }
        }
        self.let_rest_follow()?;
        let state = MachineState { running: self.go_on, ..self.session.machine.save()? };
        self.session.send(&Message::State(state))?;
        match self.session.receive("ready")? {
            Message::Ready => Ok(()),
            other => Err(WireError::Unexpected { found: other.name(), expected: "ready" }.into()),
        }
    }

    /// What is still owed follows the guest, which may need it from here on: the destination's host may touch guest memory
    /// as soon as it has the state.
    fn let_rest_follow(&mut self) -> Result<(), SourceError> {
        let Some((following, faults)) = self.session.following.take() else { return Ok(()) };
        let plan = self.session.plan.clone();
        send_ranges(&plan.owed_ranges(), &mut self.session.writer, |ranges, _| Message::Later(ranges))
            .map_err(|e| self.session.explain(e))?;
        self.follower = Some(Follower::start(self.session.ram(), &following, plan.into_tail(), faults)?);
        Ok(())
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
            Ok(Message::Running) => {
                if let Some(follower) = &self.follower {
                    follower.confirm();
                }
            }
            Ok(Message::Refuse(refusal)) => {
                // The destination says itself that it does not run the guest.
                self.go_on = true;
                return Err(SourceError::Refused(refusal));
            }
            Ok(other) => {
                let unexpected = WireError::Unexpected { found: other.name(), expected: "running" };
                return Err(SourceError::Unconfirmed(unexpected));
            }
            // Whether it runs there is heard on the next connection: what it may need is kept until then.
            Err(e) if self.follower.is_some() => {
                tracing::warn!("the destination has not said that the guest runs: {e}")
            }
            Err(e) => return Err(SourceError::Unconfirmed(e)),
        }
        let swapped_in = |session: &Session<'_>| {
            let since = session.swap_before.zip(SwapCounters::read().ok());
            since.map(|(before, now)| now.since(&before)).unwrap_or_default()
        };
        let swap_ins_before_switchover = swapped_in(&self.session).swap_ins;
        let settling = Instant::now();
        // The guest runs there whatever becomes of the connection now.
        let mut bytes_followed = 0;
        let bytes_before = self.session.writer.bytes();
        let (tail, destination) = match self.follower.take() {
            Some(follower) => {
                let followed = self.follow(follower)?;
                if !followed.is_confirmed {
                    return Err(SourceError::Unconfirmed(WireError::Closed));
                }
                bytes_followed = followed.bytes;
                (Some(followed.tail), followed.destination)
            }
            None => {
                self.session.enter(Phase::Settling);
                match receive_message(&mut self.session.reader, "settled") {
                    Ok(Message::Settled(counts)) => (None, Some(counts)),
                    _ => (None, None),
                }
            }
        };
        let session = &self.session;
        // The migration has succeeded: figures that cannot be had must not make it fail.
        let after = session.ram().counts().unwrap_or_default();
        let swaps = swapped_in(session);
        Ok(Report {
            cold_policy: session.options.cold,
            classed_by: session.classed_by.to_owned(),
            total_ms: total.as_millis() as u64,
            downtime_us: downtime.as_micros() as u64,
            rounds: session.tracker.now.round,
            bytes_sent: bytes_before + bytes_followed,
            pages: session.tracker.now.pages,
            resent: session.tracker.now.resent,
            swap_ins: swaps.swap_ins,
            swap_outs: swaps.swap_outs,
            swap_ins_before_switchover,
            source: SourceResidency {
                resident_before: session.before.resident,
                resident_peak: session.peak.max(after.resident),
                resident_after: after.resident,
                swapped_before: session.before.swapped,
                swapped_after: after.swapped,
            },
            destination,
            settle_ms: settling.elapsed().as_millis() as u64,
            tail,
        })
    }

    /// Sends what follows the guest.
    fn follow(&mut self, follower: Follower) -> Result<Followed, SourceError> {
        let session = &mut self.session;
        // The follower makes its own connections after this one; the session keeps handles that are of no use.
        let spare = session.writer.link().try_clone().map_err(WireError::from)?;
        let reader = std::mem::replace(&mut session.reader, FrameReader::new(spare));
        let spare = session.writer.link().try_clone().map_err(WireError::from)?;
        let before = session.writer.bytes();
        let writer = std::mem::replace(&mut session.writer, FrameWriter::new(spare));
        let owed = session.plan.owed();
        session.count_following();
        let (tracker, observer) = (&mut session.tracker, &mut session.observer);
        let mut show = |phase, tail: TailReport, bytes: u64| {
            tracker.now.phase = phase;
            tracker.now.tail = Some(tail);
            let left = (owed.hot + owed.cold).saturating_sub(tail.given_back / PAGE_SIZE);
            observer.progress(tracker.update(before + bytes, Owed { hot: 0, cold: left }));
        };
        Ok(follower.follow((reader, writer), session.options.cold_rate, &mut show))
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
