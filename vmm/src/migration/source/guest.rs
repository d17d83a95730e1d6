//! The guest at the source: whether it runs, whether its writes are logged, and whose it is.

use std::sync::Arc;
use std::time::Instant;

use crate::devices::Handover;
use crate::machine::{MachineError, MachineState};
use crate::migration::{Belief, SourceMachine};
use crate::ram::{GuestRam, PageSet, ReadPages};
use crate::stopwatch::Step;

/// The guest. Unless it has been handed over it goes on as it was when this is dropped, its writes logged no more.
pub(super) struct Guest<'m> {
    machine: &'m dyn SourceMachine,
    is_logged: bool,
    paused: Option<Paused>,
}

/// A guest that was paused for switchover.
struct Paused {
    since: Instant,
    was_running: bool,
    /// The destination may take what only one host may have.
    is_offered: bool,
    /// It may run at the destination.
    is_handed_over: bool,
}

impl<'m> Guest<'m> {
    pub(super) fn new(machine: &'m dyn SourceMachine) -> Self {
        Self { machine, is_logged: false, paused: None }
    }

    pub(super) fn ram(&self) -> &'m Arc<GuestRam> {
        self.machine.ram()
    }

    /// Who reads its memory for post-copy.
    pub(super) fn page_reader(&self) -> Arc<dyn ReadPages> {
        self.machine.page_reader()
    }

    /// What somebody believes of its memory, of all of it.
    pub(super) fn believed(&self) -> Option<Belief> {
        self.machine.believed().filter(|belief| belief.hint.len() == self.ram().pages())
    }

    /// From here on every write is known.
    pub(super) fn log_writes(&mut self) -> Result<(), MachineError> {
        self.machine.start_dirty_log()?;
        self.is_logged = true;
        Ok(())
    }

    /// The pages written since the last call.
    pub(super) fn take_written(&self) -> Result<PageSet, MachineError> {
        self.machine.take_dirty_log()
    }

    /// Less of what its devices have to do is left for when it stands.
    pub(super) fn prepare(&self) -> Result<(), MachineError> {
        self.machine.hand_over(Handover::Prepare)
    }

    /// Stops it, as far as that is possible: it goes on when that failed, too.
    pub(super) fn pause(&mut self) -> Result<(), MachineError> {
        let was_running = self.machine.is_running();
        let since = Instant::now();
        let paused = self.machine.pause();
        self.paused = Some(Paused { since, was_running, is_offered: false, is_handed_over: false });
        paused
    }

    /// How long its parts took to come to rest.
    pub(super) fn take_steps(&self) -> Vec<Step> {
        self.machine.take_steps()
    }

    /// Everything but its memory, while it is paused.
    pub(super) fn save(&self) -> Result<MachineState, MachineError> {
        let running = self.paused.as_ref().is_some_and(|paused| paused.was_running);
        Ok(MachineState { running, ..self.machine.save()? })
    }

    /// Lets the destination take what only one host may have, once all is saved.
    pub(super) fn offer(&mut self) -> Result<(), MachineError> {
        if let Some(paused) = &mut self.paused {
            paused.is_offered = true;
        }
        self.machine.hand_over(Handover::Offer)
    }

    /// It runs at the destination, which has all of that.
    pub(super) fn leave(&self) {
        if let Err(e) = self.machine.hand_over(Handover::Leave) {
            tracing::warn!("{e}");
        }
    }

    /// Goes on, if it was paused for a switchover that does not happen and ran before that.
    pub(super) fn go_on(&mut self) {
        let Some(paused) = self.paused.take_if(|paused| !paused.is_handed_over) else { return };
        // The destination does not run it, and so does not write: that it may not have let go yet keeps nobody waiting.
        if paused.is_offered
            && let Err(e) = self.machine.hand_over(Handover::Keep)
        {
            tracing::warn!("{e}");
        }
        if paused.was_running {
            self.machine.resume();
        }
    }

    /// It may run at the destination from here on: it never goes on here by itself.
    pub(super) fn hand_over(&mut self) {
        self.set_handed_over(true);
    }

    /// The destination says that it does not run the guest, and never has.
    pub(super) fn take_back(&mut self) {
        self.set_handed_over(false);
    }

    /// When it was paused.
    pub(super) fn paused_since(&self) -> Option<Instant> {
        self.paused.as_ref().map(|paused| paused.since)
    }

    fn set_handed_over(&mut self, is_handed_over: bool) {
        if let Some(paused) = &mut self.paused {
            paused.is_handed_over = is_handed_over;
        }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.go_on();
        if self.is_logged
            && let Err(e) = self.machine.stop_dirty_log()
        {
            tracing::warn!("the dirty log stays on: {e}");
        }
    }
}
