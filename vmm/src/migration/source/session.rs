//! What the source knows and holds while it migrates, from the first message to the end of pre-copy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memory_agent::{Counts, PAGE_SIZE, PageState, Residency, SwapCounters};

use super::{Following, Options, SourceError, Switchover};
use crate::migration::SourceMachine;
use crate::migration::cancel::Cancel;
use crate::migration::link::Link;
use crate::migration::plan::{ColdPolicy, Plan};
use crate::migration::progress::{Observer, Phase, Tracker};
use crate::migration::rendezvous::{Channel, JoinError};
use crate::migration::wire::message::receive_message;
use crate::migration::wire::{FrameReader, FrameWriter, Message, Offer, WireError, preamble};
use crate::ram::{GuestRam, PageSet};

/// How long to wait for the destination's reason after its connection broke.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// A round that leaves more than this share of the last one's pages does not shrink any more.
const STILL_SHRINKING: f64 = 0.75;
/// So few pages are not worth another round.
const FEW_PAGES: u64 = 64;

/// A migration under way.
pub(super) struct Session<'m> {
    pub(super) machine: &'m dyn SourceMachine,
    pub(super) options: &'m Options,
    pub(super) cancel: &'m Cancel,
    pub(super) observer: &'m mut dyn Observer,
    pub(super) writer: FrameWriter<Link>,
    pub(super) reader: FrameReader<Link>,
    pub(super) plan: Plan,
    /// How pages may follow the guest, and the channel for those that it waits for.
    pub(super) following: Option<(Arc<Following>, Link)>,
    /// Pages that were found swapped at any time before they were delivered.
    pub(super) swapped: PageSet,
    /// Pages delivered at least once.
    pub(super) delivered: PageSet,
    pub(super) tracker: Tracker,
    pub(super) before: Counts,
    /// The most resident pages seen.
    pub(super) peak: u64,
    pub(super) swap_before: Option<SwapCounters>,
    /// The probe that told what each page was at the beginning.
    pub(super) classed_by: &'static str,
    /// Bytes a second that landed in the last round that had enough of them.
    bandwidth: f64,
    round_started: (Instant, u64),
    log_started: bool,
    /// Reused for every batch.
    pub(super) payload: Vec<u8>,
}

impl<'m> Session<'m> {
    /// Says who we are, what we send, and hears whether the destination takes it.
    pub(super) fn negotiate(
        machine: &'m dyn SourceMachine,
        link: Link,
        options: &'m Options,
        following: Option<&Arc<Following>>,
        cancel: &'m Cancel,
        observer: &'m mut dyn Observer,
    ) -> Result<Self, SourceError> {
        cancel.watch(&link);
        let ram = machine.ram();
        let mut reader = FrameReader::new(link.try_clone().map_err(WireError::from)?);
        let mut writer = FrameWriter::new(link);
        preamble::send(writer.link())?;
        preamble::receive(reader.link())?;
        let session = following.map(|following| following.rendezvous.session());
        let offer = Offer { machine: machine.describe(), cold: options.cold, window: options.window, session };
        let answer = Message::Offer(offer).send(&mut writer).and_then(|()| receive_message(&mut reader, "accept"));
        match answer {
            Ok(Message::Accept(accepted)) => {
                tracing::info!(can_page_out = accepted.can_page_out, "the destination takes the machine");
            }
            Ok(Message::Refuse(refusal)) => return Err(SourceError::Refused(refusal)),
            Ok(other) => return Err(WireError::Unexpected { found: other.name(), expected: "accept" }.into()),
            Err(_) if cancel.is_cancelled() => return Err(SourceError::Cancelled),
            Err(e) => return Err(e.into()),
        }
        let following = following.map(|following| open_fault_channel(following, writer.link())).transpose()?;
        let pages = ram.pages();
        Ok(Self {
            machine,
            options,
            cancel,
            observer,
            writer,
            reader,
            plan: Plan::new(&Residency::uniform(pages, PageState::Resident), options.cold),
            following,
            swapped: PageSet::new(pages),
            delivered: PageSet::new(pages),
            tracker: Tracker::new(pages),
            before: Counts::default(),
            peak: 0,
            swap_before: SwapCounters::read().ok(),
            classed_by: memory_agent::exact_probe().name(),
            bandwidth: 0.0,
            round_started: (Instant::now(), 0),
            log_started: false,
            payload: Vec::new(),
        })
    }

    pub(super) fn ram(&self) -> &'m Arc<GuestRam> {
        self.machine.ram()
    }

    /// Pages that must be delivered before the guest can go.
    fn owed_before(&self) -> u64 {
        let owed = self.plan.owed();
        if self.options.cold == ColdPolicy::Lazy { owed.hot } else { owed.hot + owed.cold }
    }

    /// Cold pages that follow the guest may have woken up meanwhile: those are sent as the warm ones are.
    fn wake_lazy(&mut self) -> Result<(), SourceError> {
        if self.options.cold != ColdPolicy::Lazy {
            return Ok(());
        }
        let cold: Vec<_> = self.plan.cold().collect();
        for run in cold {
            for awake in self.ram().residency(run.clone())?.ranges_of(PageState::Resident) {
                self.plan.found_awake(run.start + awake.start..run.start + awake.end);
            }
        }
        Ok(())
    }

    /// From here on every write is known.
    pub(super) fn start_dirty_log(&mut self) -> Result<(), SourceError> {
        self.machine.start_dirty_log()?;
        self.log_started = true;
        Ok(())
    }

    /// Finds out what each page is. A page that is written after this is in the dirty log.
    ///
    /// What somebody believes is believed about pages that are there: it chooses the lane, and each lane looks again before
    /// it reads. Holes are looked at here in any case, since nobody will look at them again.
    pub(super) fn classify(&mut self) -> Result<(), SourceError> {
        let residency = match self.machine.believed().filter(|belief| belief.hint.len() == self.ram().pages()) {
            Some(belief) => {
                self.classed_by = belief.probe;
                self.ram().resolve(belief.hint)?
            }
            None => self.ram().residency(0..self.ram().pages())?,
        };
        self.plan = Plan::new(&residency, self.options.cold);
        self.before = self.ram().counts()?;
        self.peak = self.before.resident;
        residency.ranges_of(PageState::Swapped).for_each(|run| self.swapped.insert_range(run));
        let holes = residency.ranges_of(PageState::Hole).map(|hole| self.found_hole(hole)).collect();
        self.send_zeros(holes)
    }

    /// Lets people see which phase this is.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.tracker.now.phase = phase;
        self.show();
    }

    pub(super) fn show(&mut self) {
        let progress = self.tracker.update(self.writer.bytes(), self.plan.owed());
        self.observer.progress(progress);
    }

    /// Sends the warm pages once.
    pub(super) fn send_warm(&mut self) -> Result<(), SourceError> {
        self.begin_round();
        self.send_hot_lane(false)
    }

    /// Sends the cold pages, a window at a time.
    pub(super) fn send_cold(&mut self) -> Result<(), SourceError> {
        if self.options.cold == ColdPolicy::Paced && self.plan.owed().cold > 0 {
            self.begin_round();
            self.send_cold_lane()?;
            self.finish_round()?;
        }
        Ok(())
    }

    /// Sends what the guest wrote meanwhile, until so little is left that the guest can be stopped for it.
    pub(super) fn converge(&mut self) -> Result<(), SourceError> {
        if self.options.switchover == Switchover::Now {
            return Ok(());
        }
        let mut last_owed = u64::MAX;
        loop {
            let since = self.round_started.0;
            let dirty = self.machine.take_dirty_log()?;
            self.tracker.now.dirty_bytes_per_second =
                ((dirty.len() * PAGE_SIZE) as f64 / since.elapsed().as_secs_f64().max(1e-3)) as u64;
            self.plan.written(&dirty);
            self.wake_lazy()?;
            let owed = self.owed_before();
            let downtime = self.estimate(owed);
            let shrinking = (owed as f64) < last_owed as f64 * STILL_SHRINKING;
            let last_round = self.tracker.now.round >= self.options.max_rounds;
            if downtime <= self.options.downtime_limit && (owed <= FEW_PAGES || !shrinking || last_round) {
                return Ok(());
            }
            if last_round {
                return Err(SourceError::NotConverging {
                    rounds: self.tracker.now.round,
                    dirty_mib: self.tracker.now.dirty_bytes_per_second as f64 / f64::from(1 << 20),
                    link_mib: self.bandwidth / f64::from(1 << 20),
                    downtime_ms: downtime.as_millis() as u64,
                });
            }
            last_owed = owed;
            self.begin_round();
            self.send_hot_lane(false)?;
            if self.options.cold != ColdPolicy::Lazy {
                self.send_cold_lane()?;
            }
            self.finish_round()?;
        }
    }

    /// Looks how many pages are resident now.
    pub(super) fn sample_peak(&mut self) -> Result<(), SourceError> {
        self.peak = self.peak.max(self.ram().counts()?.resident);
        Ok(())
    }

    pub(super) fn begin_round(&mut self) {
        self.tracker.now.round += 1;
        self.round_started = (Instant::now(), self.writer.bytes());
    }

    /// Waits until everything sent has landed.
    pub(super) fn finish_round(&mut self) -> Result<(), SourceError> {
        let round = self.tracker.now.round;
        self.send(&Message::RoundEnd(round))?;
        match self.receive("round done")? {
            Message::RoundDone(done) if done == round => {}
            other => return Err(WireError::Unexpected { found: other.name(), expected: "round done" }.into()),
        }
        let (started, bytes) = self.round_started;
        let sent = self.writer.bytes() - bytes;
        let rate = sent as f64 / started.elapsed().as_secs_f64().max(1e-6);
        // A round of a few pages measures the round trip, not the link.
        if sent >= 1 << 20 || self.bandwidth == 0.0 {
            self.bandwidth = rate;
        }
        self.show();
        Ok(())
    }

    /// How long it takes to deliver so many pages.
    fn estimate(&self, pages: u64) -> Duration {
        if self.bandwidth <= 0.0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64((pages * PAGE_SIZE) as f64 / self.bandwidth)
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<(), SourceError> {
        message.send(&mut self.writer).map_err(|e| self.explain(e))
    }

    pub(super) fn receive(&mut self, expected: &'static str) -> Result<Message, SourceError> {
        match receive_message(&mut self.reader, expected) {
            Ok(Message::Refuse(refusal)) => Err(SourceError::Refused(refusal)),
            Ok(message) => Ok(message),
            Err(e) => Err(self.explain(e)),
        }
    }

    /// What was behind a connection that broke: our own cancelling, or a refusal that is still to be read.
    pub(super) fn explain(&mut self, error: WireError) -> SourceError {
        if self.cancel.is_cancelled() {
            return SourceError::Cancelled;
        }
        if matches!(error, WireError::Io(_)) {
            self.reader.link().set_deadline(Some(Instant::now() + LAST_WORDS));
            if let Ok(Message::Refuse(refusal)) = receive_message(&mut self.reader, "refuse") {
                return SourceError::Refused(refusal);
            }
        }
        error.into()
    }

    pub(super) fn check_cancelled(&self) -> Result<(), SourceError> {
        if self.cancel.is_cancelled() { Err(SourceError::Cancelled) } else { Ok(()) }
    }

    /// Says goodbye to the destination and puts the machine as it was.
    pub(super) fn give_up(mut self, error: SourceError) -> SourceError {
        // The connection may be what broke.
        let _ = Message::Abort(error.to_string()).send(&mut self.writer);
        error
    }
}

/// Opens the channel for pages that the guest waits for, beside the connection there is.
fn open_fault_channel(following: &Arc<Following>, bulk: &Link) -> Result<(Arc<Following>, Link), SourceError> {
    let rendezvous = &following.rendezvous;
    if let Some(address) = following.address() {
        rendezvous.connect(&address, &[Channel::Faults])?;
    }
    let faults = rendezvous.take(Channel::Faults, LAST_WORDS).ok_or(JoinError::Stranger)?;
    rendezvous.adopt(Channel::Bulk, bulk);
    Ok((Arc::clone(following), faults))
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if self.log_started
            && let Err(e) = self.machine.stop_dirty_log()
        {
            tracing::warn!("the dirty log stays on: {e}");
        }
    }
}
