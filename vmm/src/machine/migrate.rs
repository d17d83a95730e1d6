//! A machine as migration sees it.

use std::sync::Arc;

use super::{Machine, MachineError, MachineSpec, MachineState};
use crate::devices::Handover;
use crate::migration::{Belief, DestinationMachine, SourceMachine};
use crate::ram::{GuestRam, PageSet};
use crate::stopwatch::Step;

impl SourceMachine for Machine {
    fn ram(&self) -> &Arc<GuestRam> {
        self.ram()
    }
    fn believed(&self) -> Option<Belief> {
        let watch = self.ram_watch()?;
        Some(Belief { hint: watch.hint()?, probe: watch.probe() })
    }
    fn describe(&self) -> MachineSpec {
        self.describe()
    }
    fn start_dirty_log(&self) -> Result<(), MachineError> {
        self.start_dirty_log()
    }
    fn take_dirty_log(&self) -> Result<PageSet, MachineError> {
        self.take_dirty_log()
    }
    fn stop_dirty_log(&self) -> Result<(), MachineError> {
        self.stop_dirty_log()
    }
    fn pause(&self) -> Result<(), MachineError> {
        self.pause()
    }
    fn resume(&self) {
        self.resume();
    }
    fn take_steps(&self) -> Vec<Step> {
        self.take_steps()
    }
    fn is_running(&self) -> bool {
        self.is_running()
    }
    fn save(&self) -> Result<MachineState, MachineError> {
        self.save()
    }
    fn hand_over(&self, step: Handover) -> Result<(), MachineError> {
        self.hand_over(step)
    }
}

impl DestinationMachine for Machine {
    fn try_pause(&self) -> bool {
        self.try_pause()
    }
    fn ram(&self) -> &Arc<GuestRam> {
        self.ram()
    }
    fn restore(&self, state: &MachineState) -> Result<(), MachineError> {
        self.restore(state)
    }
    fn take_over(&self) -> Result<(), MachineError> {
        self.hand_over(Handover::Take)
    }
    fn resume(&self) {
        self.resume_measured();
    }
    fn pause(&self) -> Result<(), MachineError> {
        self.pause()
    }
    fn take_steps(&self) -> Vec<Step> {
        self.take_steps()
    }
    fn is_running(&self) -> bool {
        self.is_running()
    }
}
