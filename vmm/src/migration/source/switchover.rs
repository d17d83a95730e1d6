//! Switchover: the guest is paused, the last pages and the state go over, and then it belongs to the destination.
//!
//! Two steps. Until [`Message::Ready`] arrives the source can go on, and does when anything fails or takes too long. Once
//! [`Message::Commit`] has been written the destination may run the guest, so this side never does by itself again.
//! With post-copy ([`super::postcopy`]), they are kept here until then, whole, whoever has asked for some.

use std::time::{Duration, Instant};

use memory_agent::{ByteSize, Counts, PAGE_SIZE};

use super::peer::{Peer, unexpected};
use super::postcopy::PostCopySource;
use super::session::Session;
use super::{SourceError, Switchover};
use crate::machine::MachineState;
use crate::migration::downtime::{Downtime, Steps};
use crate::migration::plan::{ColdPolicy, Owed};
use crate::migration::progress::{Phase, PostCopyReport, Report, Tracker};
use crate::migration::wire::message::{receive_message, send_ranges};
use crate::migration::wire::{Message, WireError};
use crate::stopwatch::Work;

/// How much longer than the downtime that was accepted the guest may be paused for the network and the destination, before it
/// goes on here.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long the destination may take to say that the guest runs there.
const RUNNING_LIMIT: Duration = Duration::from_secs(10);

/// What came of the last phase: what post-copy sent, what guest RAM is at the destination, and bytes sent for that.
type PagedOut = (Option<PostCopyReport>, Option<Counts>, u64);

impl Session<'_> {
    /// Stops the guest and hands it over.
    pub(super) fn switch_over(&mut self) -> Result<(), SourceError> {
        self.enter(Phase::Switchover);
        self.guest.pause()?;
        self.steps = Steps::of(self.guest.take_steps());
        self.peer.set_deadline(Some(Instant::now() + self.options.downtime_limit + READY_LIMIT));
        let since = Instant::now();
        // Before the last look at what has been written: KVM writes some of the state into guest memory itself (steal time, when a thread that
        // has loaded the vCPU loses its CPU).
        let state = self.guest.save()?;
        self.steps.add_state(Work::Save, since);
        let since = Instant::now();
        self.send_rest()?;
        self.announce_outstanding()?;
        self.steps.add_ram(Work::LastRound, since);
        self.send_state(state)?;
        self.commit()
    }

    /// The last pages.
    fn send_rest(&mut self) -> Result<(), SourceError> {
        let written = self.guest.take_written()?;
        self.delivery.plan.written(&written);
        if self.options.switchover == Switchover::Now {
            return Ok(());
        }
        let cold_follows = self.options.cold == ColdPolicy::Lazy;
        // Time presses: what is cold by now is sent with the rest, and no window is paged out. Unless it may be left to post-copy.
        while self.delivery.owed_before_switchover() > 0 {
            if !cold_follows {
                self.delivery.plan.found_resident(self.ram().all_pages());
            }
            self.send_hot_lane(!cold_follows)?;
        }
        Ok(())
    }

    /// What is still owed is left to post-copy, which may need it from here on: the destination's host may touch guest memory
    /// as soon as it has the state.
    fn announce_outstanding(&mut self) -> Result<(), SourceError> {
        let Some((control, faults)) = self.control.take() else { return Ok(()) };
        let plan = self.delivery.plan.clone();
        send_ranges(&plan.owed_ranges(), &mut self.peer.writer, |ranges, _| Message::Outstanding(ranges))?;
        self.post_copy = Some(PostCopySource::start(&self.guest, &control, plan.into_outstanding(), faults)?);
        Ok(())
    }

    /// Everything but memory, and the destination's word that it has it all.
    fn send_state(&mut self, state: MachineState) -> Result<(), SourceError> {
        self.guest.offer()?;
        self.peer.send(&Message::State(state))?;
        match self.peer.receive("ready")? {
            Message::Ready => Ok(()),
            other => Err(unexpected(&other, "ready").into()),
        }
    }

    /// Gives the guest away. When this fails not all of the message has left, so that the destination cannot have it.
    fn commit(&mut self) -> Result<(), SourceError> {
        self.peer.close_cancel()?;
        self.peer.send(&Message::Commit)?;
        self.guest.hand_over();
        Ok(())
    }

    /// Everything behind the guest's handing over: it runs at the destination whatever becomes of the connection now.
    pub(super) fn finish(mut self) -> Result<Report, SourceError> {
        let there = self.wait_until_it_runs()?;
        let downtime = self.guest.paused_since().map(|since| since.elapsed()).unwrap_or_default();
        let total = self.figures.elapsed();
        let swap_ins_before_switchover = self.figures.swaps().swap_ins;
        let paging_out = Instant::now();
        let bytes_before = self.peer.writer.bytes();
        let (post_copy, destination, post_copy_bytes) = match self.post_copy.take() {
            Some(post_copy) => {
                self.delivery.count_outstanding();
                self.show();
                let owed = self.delivery.plan.owed();
                let followed = follow(post_copy, self.peer, self.options.cold_rate, owed, &mut self.tracker)?;
                self.guest.leave();
                followed
            }
            None => {
                self.enter(Phase::PagingOut);
                wait_until_settled(self.peer)
            }
        };
        let swaps = self.figures.swaps();
        Ok(Report {
            cold_policy: self.options.cold,
            classed_by: self.classed_by.to_owned(),
            total_ms: total.as_millis() as u64,
            downtime_us: downtime.as_micros() as u64,
            downtime: Downtime::new(downtime, std::mem::take(&mut self.steps), there),
            rounds: self.rounds.count(),
            bytes_sent: bytes_before + post_copy_bytes,
            pages: self.delivery.pages(),
            resent: self.delivery.resent(),
            swap_ins: swaps.swap_ins,
            swap_outs: swaps.swap_outs,
            swap_ins_before_switchover,
            source: self.figures.residency(self.guest.ram()),
            destination,
            page_out_ms: paging_out.elapsed().as_millis() as u64,
            post_copy,
        })
    }

    /// Waits for the destination's word that the guest runs there, and how long what it did for that took.
    fn wait_until_it_runs(&mut self) -> Result<Steps, SourceError> {
        self.peer.set_deadline(Some(Instant::now() + RUNNING_LIMIT));
        let running = receive_message(&mut self.peer.reader, "running");
        self.peer.set_deadline(None);
        match (running, &self.post_copy) {
            (Ok(Message::Running(steps)), post_copy) => {
                self.guest.leave();
                post_copy.as_ref().inspect(|post_copy| post_copy.confirm());
                Ok(steps)
            }
            // It says itself that it does not run the guest.
            (Ok(Message::Refuse(refusal)), _) => {
                self.guest.take_back();
                Err(SourceError::Refused(refusal))
            }
            (Ok(other), _) => Err(SourceError::Unconfirmed(unexpected(&other, "running"))),
            // Whether it runs there is heard on the next connection: what it may need is kept until then.
            (Err(e), Some(_)) => {
                tracing::warn!("the destination has not said that the guest runs: {e}");
                Ok(Steps::default())
            }
            (Err(e), None) => Err(SourceError::Unconfirmed(e)),
        }
    }
}

/// Waits until the destination has paged out what was cold.
fn wait_until_settled(mut peer: Peer<'_>) -> PagedOut {
    match receive_message(&mut peer.reader, "paged out") {
        Ok(Message::PagedOut(counts)) => (None, Some(counts), 0),
        _ => (None, None, 0),
    }
}

/// Sends what is left to post-copy: `owed`, at `rate` bytes a second beside what it waits for.
fn follow(
    post_copy: PostCopySource,
    peer: Peer<'_>,
    rate: ByteSize,
    owed: Owed,
    tracker: &mut Tracker<'_>,
) -> Result<PagedOut, SourceError> {
    let before = peer.writer.bytes();
    let mut show = |phase, report: PostCopyReport, bytes: u64| {
        tracker.now.phase = phase;
        tracker.now.post_copy = Some(report);
        let left = (owed.hot + owed.cold).saturating_sub(report.given_back / PAGE_SIZE);
        tracker.show(before + bytes, Owed { hot: 0, cold: left });
    };
    let outcome = post_copy.follow((peer.reader, peer.writer), rate, &mut show);
    if !outcome.is_confirmed {
        return Err(SourceError::Unconfirmed(WireError::Closed));
    }
    Ok((Some(outcome.report), outcome.destination, outcome.bytes))
}
