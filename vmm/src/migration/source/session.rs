//! The source's migration from the first message to the end of pre-copy, a function a phase.

use std::sync::Arc;
use std::time::Duration;

use memory_agent::PageState;

use super::delivery::Delivery;
use super::figures::Figures;
use super::guest::Guest;
use super::peer::{Peer, unexpected};
use super::postcopy::{PostCopyControl, PostCopySource};
use super::rounds::Rounds;
use super::{Options, SourceError, Switchover};
use crate::migration::SourceMachine;
use crate::migration::cancel::Cancel;
use crate::migration::channels::JoinError;
use crate::migration::downtime::Steps;
use crate::migration::link::Link;
use crate::migration::plan::ColdPolicy;
use crate::migration::progress::{Observer, Phase, Tracker};
use crate::migration::wire::{Channel, Message, MigrationId, Offer};
use crate::ram::GuestRam;

/// How long the destination may take to land what was sent in a round.
const ROUND_LIMIT: Duration = Duration::from_secs(30);
/// How long a connection may take to be found that has come about already.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A migration under way. Its parts go in this order: whatever becomes of it, the guest goes on before a connection is
/// waited for.
pub(super) struct Session<'m> {
    pub(super) options: &'m Options,
    pub(super) guest: Guest<'m>,
    pub(super) peer: Peer<'m>,
    pub(super) delivery: Delivery,
    pub(super) rounds: Rounds,
    pub(super) figures: Figures,
    pub(super) tracker: Tracker<'m>,
    /// The probe that told what each page was at the beginning.
    pub(super) classed_by: &'static str,
    /// How pages may be left to post-copy, and the channel for those that it waits for.
    pub(super) control: Option<(Arc<PostCopyControl>, Link)>,
    /// Sends what is left to post-copy, once it is known what that is.
    pub(super) post_copy: Option<PostCopySource>,
    /// What the guest has been stopped for so far.
    pub(super) steps: Steps,
    /// Reused for every batch.
    pub(super) payload: Vec<u8>,
}

impl<'m> Session<'m> {
    /// Says who we are, what we send, and hears whether the destination takes it.
    pub(super) fn negotiate(
        machine: &'m dyn SourceMachine,
        link: Link,
        id: MigrationId,
        options: &'m Options,
        control: Option<&Arc<PostCopyControl>>,
        cancel: &'m Cancel,
        observer: &'m mut dyn Observer,
    ) -> Result<Self, SourceError> {
        let figures = Figures::new();
        let mut peer = Peer::introduce(link, cancel)?;
        let (machine_spec, post_copy) = (machine.describe(), control.is_some());
        peer.offer(Offer { machine: machine_spec, cold: options.cold, window: options.window, id, post_copy })?;
        let control = control.map(|control| open_fault_channel(control, peer.writer.link())).transpose()?;
        let pages = machine.ram().pages();
        Ok(Self {
            options,
            guest: Guest::new(machine),
            peer,
            delivery: Delivery::new(pages, options.cold),
            rounds: Rounds::new(),
            figures,
            tracker: Tracker::new(pages, observer),
            classed_by: memory_agent::exact_probe().name(),
            control,
            post_copy: None,
            steps: Steps::default(),
            payload: Vec::new(),
        })
    }

    pub(super) fn ram(&self) -> &'m Arc<GuestRam> {
        self.guest.ram()
    }

    /// Everything that happens while the guest runs.
    pub(super) fn copy(&mut self) -> Result<(), SourceError> {
        self.guest.log_writes()?;
        self.enter(Phase::Hot);
        self.classify()?;
        self.begin_round();
        self.send_hot_lane(false)?;
        self.finish_round()?;
        self.enter(Phase::Cold);
        self.send_cold()?;
        self.enter(Phase::Converging);
        self.converge()
    }

    /// Finds out what each page is. A page that is written after this is in the dirty log.
    ///
    /// What somebody believes is believed about pages that are there: it chooses the lane, and each lane looks again before
    /// it reads. Holes are looked at here in any case, since nobody will look at them again.
    fn classify(&mut self) -> Result<(), SourceError> {
        let residency = match self.guest.believed() {
            Some(belief) => {
                self.classed_by = belief.probe;
                self.ram().resolve(belief.hint)?
            }
            None => self.ram().residency(self.ram().all_pages())?,
        };
        self.figures.look_before(self.guest.ram())?;
        let holes = self.delivery.classify(&residency);
        self.send_zeros(holes)
    }

    /// Sends the cold pages, a window at a time.
    fn send_cold(&mut self) -> Result<(), SourceError> {
        if self.options.cold == ColdPolicy::Paced && self.delivery.plan.owed().cold > 0 {
            self.begin_round();
            self.send_cold_lane()?;
            self.finish_round()?;
        }
        Ok(())
    }

    /// Sends what the guest wrote meanwhile, until so little is left that the guest can be stopped for it.
    fn converge(&mut self) -> Result<(), SourceError> {
        self.guest.prepare()?;
        if self.options.switchover == Switchover::Now {
            return Ok(());
        }
        loop {
            let written = self.guest.take_written()?;
            self.rounds.written(written.len());
            self.delivery.plan.written(&written);
            self.resident_again()?;
            if self.rounds.may_stop(self.delivery.owed_before_switchover(), self.options)? {
                return Ok(());
            }
            self.begin_round();
            self.send_hot_lane(false)?;
            if self.options.cold != ColdPolicy::Lazy {
                self.send_cold_lane()?;
            }
            self.finish_round()?;
        }
    }

    /// Cold pages left to post-copy may have been swapped in meanwhile: those are sent as the warm ones are.
    fn resident_again(&mut self) -> Result<(), SourceError> {
        if self.options.cold != ColdPolicy::Lazy {
            return Ok(());
        }
        let cold: Vec<_> = self.delivery.plan.cold().collect();
        for run in cold {
            let residency = self.ram().residency(run)?;
            residency.ranges_of(PageState::Resident).for_each(|awake| self.delivery.plan.found_resident(awake));
        }
        Ok(())
    }

    fn begin_round(&mut self) {
        self.rounds.begin(self.peer.writer.bytes());
    }

    /// Waits until everything sent has landed.
    fn finish_round(&mut self) -> Result<(), SourceError> {
        let round = self.rounds.count();
        self.peer.send(&Message::RoundEnd(round))?;
        match self.peer.receive_within(ROUND_LIMIT, "round done")? {
            Message::RoundDone(done) if done == round => {}
            other => return Err(unexpected(&other, "round done").into()),
        }
        self.rounds.landed(self.peer.writer.bytes());
        self.show();
        Ok(())
    }

    /// Lets people see which phase this is.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.tracker.now.phase = phase;
        self.show();
    }

    pub(super) fn show(&mut self) {
        let now = &mut self.tracker.now;
        (now.pages, now.resent) = (self.delivery.pages(), self.delivery.resent());
        (now.round, now.dirty_bytes_per_second) = (self.rounds.count(), self.rounds.dirty_bytes_per_second());
        self.tracker.show(self.peer.writer.bytes(), self.delivery.plan.owed());
    }

    /// Puts the machine as it was, and says goodbye to the destination. The guest goes on first: it is not paused for a
    /// connection that may be what broke.
    pub(super) fn give_up(mut self, error: SourceError) -> SourceError {
        self.guest.go_on();
        let error = self.peer.explain(error);
        self.peer.abort(&error);
        error
    }
}

/// Opens the channel for pages that the guest waits for, beside the connection there is.
fn open_fault_channel(
    control: &Arc<PostCopyControl>,
    bulk: &Link,
) -> Result<(Arc<PostCopyControl>, Link), SourceError> {
    let channels = &control.channels;
    if let Some(address) = control.address() {
        channels.connect(&address, &[Channel::Faults]).map_err(SourceError::Channel)?;
    }
    let faults = channels.take(Channel::Faults, AT_ONCE).ok_or(SourceError::Channel(JoinError::Gone))?;
    channels.adopt(Channel::Bulk, bulk);
    Ok((Arc::clone(control), faults))
}
