//! Live migration: which page goes when, how it travels, and who owns the guest.
//!
//! | to read about | open |
//! |---|---|
//! | which page goes when | `plan/`, pure |
//! | bytes on the wire | `wire/` |
//! | connections | `link/` |
//! | who connects, and says who it is | `listening.rs` |
//! | further connections of one migration | `channels.rs` |
//! | the side that sends | `source/` |
//! | the side that receives | `destination/` |
//! | what people and metrics see | `progress.rs`, `downtime.rs` |
//!
//! A machine is seen through [`SourceMachine`] and [`DestinationMachine`], so that all of this runs in tests without
//! KVM.

pub mod cancel;
pub mod channels;
pub mod destination;
pub mod downtime;
mod fault_priority;
pub mod link;
mod listening;
pub mod plan;
pub mod progress;
pub mod source;
mod stoppable;
pub mod wire;

use std::sync::Arc;

use memory_agent::Hint;

use crate::devices::Handover;
use crate::machine::{MachineError, MachineSpec, MachineState};
use crate::ram::{GuestRam, MissingPages, MissingRam, PageSet, RamError, RamPage, ReadPages};
use crate::stopwatch::Step;

/// What somebody believes of guest RAM, who has kept an eye on it.
#[derive(Clone, Debug)]
pub struct Belief {
    /// What that is.
    pub hint: Hint<RamPage>,
    /// The probe behind it.
    pub probe: &'static str,
}

/// What migration needs of the machine that leaves.
pub trait SourceMachine: Sync {
    /// Guest RAM.
    fn ram(&self) -> &Arc<GuestRam>;
    /// What somebody believes of guest RAM.
    fn believed(&self) -> Option<Belief> {
        None
    }
    /// Who reads pages for post-copy.
    fn page_reader(&self) -> Arc<dyn ReadPages> {
        Arc::<GuestRam>::clone(self.ram())
    }
    /// What the other host must offer.
    fn describe(&self) -> MachineSpec;
    /// Starts logging writes; all pages are clean.
    ///
    /// # Errors
    /// When the host refuses.
    fn start_dirty_log(&self) -> Result<(), MachineError>;
    /// Takes the pages written since the last call.
    ///
    /// # Errors
    /// When the host refuses.
    fn take_dirty_log(&self) -> Result<PageSet, MachineError>;
    /// Stops logging.
    ///
    /// # Errors
    /// When the host refuses.
    fn stop_dirty_log(&self) -> Result<(), MachineError>;
    /// Stops the guest; returns when it is paused.
    ///
    /// # Errors
    /// When something of it runs on. It has been told to stop; what could be stopped is paused.
    fn pause(&self) -> Result<(), MachineError>;
    /// Lets the guest go on.
    fn resume(&self);
    /// How long each part took to come to rest the last time.
    fn take_steps(&self) -> Vec<Step> {
        Vec::new()
    }
    /// Whether the guest runs.
    fn is_running(&self) -> bool;
    /// Reads everything but RAM.
    ///
    /// # Errors
    /// When the host refuses.
    fn save(&self) -> Result<MachineState, MachineError>;
    /// Has what only one host may have take a step of the guest's way to another host, or back.
    ///
    /// # Errors
    /// When it cannot, or has not in time.
    fn hand_over(&self, step: Handover) -> Result<(), MachineError> {
        let _ = step;
        Ok(())
    }
}

/// What migration needs of the machine that arrives.
pub trait DestinationMachine: Sync {
    /// Guest RAM, all holes.
    fn ram(&self) -> &Arc<GuestRam>;
    /// Writes everything but RAM.
    ///
    /// # Errors
    /// When the host refuses.
    fn restore(&self, state: &MachineState) -> Result<(), MachineError>;
    /// Takes what only one host may have from the source, which offers it from its `State` on.
    ///
    /// # Errors
    /// When somebody else has it.
    fn take_over(&self) -> Result<(), MachineError> {
        Ok(())
    }
    /// Handles faults on what guest RAM does not have, from now on.
    ///
    /// # Errors
    /// When this user may not handle a guest's faults.
    fn missing_pages(&self) -> Result<Arc<dyn MissingPages>, RamError> {
        Ok(Arc::new(MissingRam::new(Arc::clone(self.ram()))?))
    }
    /// Lets the guest run, also when it has been asked to stop and is not paused yet.
    fn resume(&self);
    /// How long each part took to be restored and to go on.
    fn take_steps(&self) -> Vec<Step> {
        Vec::new()
    }
    /// Stops the guest.
    ///
    /// # Errors
    /// When something of it runs on. It has been told to stop; what could be stopped is paused.
    fn pause(&self) -> Result<(), MachineError>;
    /// Asks the guest to stop, and waits for nothing: a vCPU cannot while the host works for it with a page that has not come.
    /// Returns whether it is paused; to be called until it is.
    fn try_pause(&self) -> bool;
    /// Whether the guest runs.
    fn is_running(&self) -> bool;
}

impl<M: DestinationMachine + Send> DestinationMachine for Arc<M> {
    fn ram(&self) -> &Arc<GuestRam> {
        self.as_ref().ram()
    }
    fn restore(&self, state: &MachineState) -> Result<(), MachineError> {
        self.as_ref().restore(state)
    }
    fn take_over(&self) -> Result<(), MachineError> {
        self.as_ref().take_over()
    }
    fn missing_pages(&self) -> Result<Arc<dyn MissingPages>, RamError> {
        self.as_ref().missing_pages()
    }
    fn try_pause(&self) -> bool {
        self.as_ref().try_pause()
    }
    fn resume(&self) {
        self.as_ref().resume();
    }
    fn take_steps(&self) -> Vec<Step> {
        self.as_ref().take_steps()
    }
    fn pause(&self) -> Result<(), MachineError> {
        self.as_ref().pause()
    }
    fn is_running(&self) -> bool {
        self.as_ref().is_running()
    }
}
