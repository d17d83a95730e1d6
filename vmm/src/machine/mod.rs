//! A machine: RAM, KVM and devices put together.
//!
//! | to read about | open |
//! |---|---|
//! | what the guest sees, and why a host cannot be it | `spec.rs` |
//! | how one is made for `run`, `receive` and whoever restores one | `builder.rs` |
//! | everything but RAM, as it travels | `state.rs` |
//! | what migration sees of one | `migrate.rs` |

mod builder;
mod migrate;
mod spec;
mod state;
#[cfg(test)]
mod tests;

pub use builder::{BuildError, Builder};
pub use spec::{Incompatibility, MachineSpec};
pub use state::MachineState;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use memory_agent::{AgentError, AgentOptions};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::state::{Time, VcpuState, VmState};
use crate::boot::{BootError, Bootable};
use crate::devices::host::{Backends, Host, Ports};
use crate::devices::{DeviceDescription, DeviceError, Devices, Handover, StopReason};
use crate::kvm::{KvmError, Told, Vcpus, Vm};
use crate::ram::{GuestRam, PageSet, RamError, RamWatch};
use crate::record::{Record, RecordError, Records, Saved};
use crate::stopwatch::{Step, Stopwatch, Work};

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Booting.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Saved state.
    #[error(transparent)]
    State(#[from] RecordError),
    /// The guest has ended or is being reset.
    #[error("the guest has stopped by itself, and is being started anew or ends; try again")]
    Stopped,
    /// It cannot be started anew.
    #[error("what it booted from is not on this host, as it came from another: start it with `thermocline run`")]
    NoKernel,
}

impl MachineError {
    /// Whether saved state is what is wrong, rather than this host.
    pub fn is_of_state(&self) -> bool {
        match self {
            Self::State(_) | Self::Device(DeviceError::State(_)) => true,
            Self::Kvm(e) => matches!(e, KvmError::Msrs(_) | KvmError::Msr { .. } | KvmError::ExtendedState(_)),
            _ => false,
        }
    }

    /// Whether what the host gives for a device has gone, or cannot be taken from another host.
    pub fn is_of_backends(&self) -> bool {
        matches!(self, Self::Device(DeviceError::Handover { .. } | DeviceError::Gone { .. }))
    }
}

/// How long vCPUs and devices have, each, to come to rest.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How long the first vCPU is waited for that is to enter the guest, and how often is looked.
const ENTRY_LIMIT: Duration = Duration::from_millis(5);
const LOOK_AGAIN: Duration = Duration::from_micros(20);
/// What all vCPUs are called where steps of a machine are measured.
const VCPUS: &str = "vcpus";

/// How long they have to get ready for a move, while the guest runs: to write what a host has cached.
const PREPARE_LIMIT: Duration = Duration::from_secs(30);

/// A machine. It is paused until [`Machine::resume`].
#[derive(Debug)]
pub struct Machine {
    // vCPU threads end before what they use goes.
    vcpus: Vcpus,
    vm: Vm,
    devices: Devices,
    /// What the VM was when it was made: what a reset makes of it.
    at_power_on: VmState,
    /// What boots, and boots again when the guest resets its machine; nothing where the guest comes from another host.
    bootable: OnceLock<Bootable>,
    running: Mutex<bool>,
    watch: OnceLock<RamWatch>,
}

impl Machine {
    /// A machine whose vCPUs have not been told where to begin, but what they are.
    ///
    /// # Errors
    /// When the host cannot offer what it takes.
    fn new(
        ram: Arc<GuestRam>,
        cpus: u8,
        told: Told<'_>,
        devices: &[DeviceDescription],
        backends: &Backends,
    ) -> Result<Self, MachineError> {
        let vm = Vm::new(ram)?;
        let devices = Devices::new(devices, Host::new(Arc::new(vm.clone()), Arc::clone(vm.ram()), backends))?;
        let vcpus = Vcpus::new(&vm, devices.bus(), cpus, told)?;
        let at_power_on = vm.save()?;
        let (running, watch) = (Mutex::new(false), OnceLock::new());
        Ok(Self { vcpus, vm, devices, at_power_on, bootable: OnceLock::new(), running, watch })
    }

    /// Loads a kernel and points the first vCPU at it; the first one is kept, to be loaded again by [`Machine::reboot`].
    ///
    /// # Errors
    /// When the kernel cannot be loaded.
    pub fn boot(&self, bootable: Bootable) -> Result<(), MachineError> {
        self.load(self.bootable.get_or_init(|| bootable))
    }

    /// Starts the machine anew, as it was when it was made, with the kernel that it booted from: after the guest has asked for a
    /// reset. It runs then if it ran before. RAM is emptied, unless `is_whole` is not set: pages of it are still to come.
    ///
    /// # Errors
    /// When there is no such kernel, or the host refuses. The guest is paused then.
    pub fn reboot(&self, is_whole: bool) -> Result<(), MachineError> {
        let bootable = self.bootable.get().ok_or(MachineError::NoKernel)?;
        // Nobody pauses, saves or resumes it meanwhile.
        let running = locked(&self.running);
        self.vcpus.pause(PAUSE_LIMIT)?;
        self.devices.pause(PAUSE_LIMIT)?;
        self.devices.reset();
        if is_whole {
            for region in self.ram().layout().regions() {
                self.ram().discard(GuestAddress(region.start), region.length)?;
            }
        }
        self.vcpus.reset()?;
        self.vm.restore(&self.at_power_on)?;
        self.load(bootable)?;
        if *running {
            self.devices.resume();
            self.vcpus.resume();
        }
        Ok(())
    }

    fn load(&self, bootable: &Bootable) -> Result<(), MachineError> {
        let entry = bootable.load(self.ram(), self.cpus())?;
        self.vcpus.with_fd(0, |fd| {
            let mut sregs = fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
            let mut regs = fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?;
            entry.set_registers(&mut regs, &mut sregs);
            fd.set_sregs(&sregs).map_err(KvmError::call("KVM_SET_SREGS"))?;
            fd.set_regs(&regs).map_err(KvmError::call("KVM_SET_REGS"))
        })?;
        Ok(())
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    /// Has an agent keep a map of guest RAM; the first call counts.
    ///
    /// # Errors
    /// When the options are not possible.
    pub fn watch_ram(&self, options: AgentOptions) -> Result<(), AgentError> {
        let watch = RamWatch::start(Arc::clone(self.ram()), options)?;
        // A second one ends at once.
        let _ = self.watch.set(watch);
        Ok(())
    }

    /// The agent, if there is one.
    pub fn ram_watch(&self) -> Option<&RamWatch> {
        self.watch.get()
    }

    /// The devices that somebody outside works with.
    pub fn ports(&self) -> &Ports {
        self.devices.ports()
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u8 {
        self.vcpus.len() as u8
    }

    /// Lets the guest run: the devices, then the vCPUs.
    pub fn resume(&self) {
        let mut running = locked(&self.running);
        *running = true;
        // A reset makes it run.
        if self.end_reason().is_none() {
            self.devices.resume();
            self.vcpus.resume();
        }
    }

    /// The same, and waits until the first vCPU enters the guest, or not for long: whoever measures how long the guest stood wants to
    /// know.
    pub fn resume_measured(&self) {
        let entries = self.vcpus.entries();
        self.resume();
        self.stopwatch().time_named(Work::Resume, VCPUS, || {
            let until = Instant::now() + ENTRY_LIMIT;
            while self.vcpus.entries() == entries && Instant::now() < until {
                std::thread::sleep(LOOK_AGAIN);
            }
        });
    }

    fn stopwatch(&self) -> &Stopwatch {
        self.devices.stopwatch()
    }

    /// How long each part has taken to come to rest, to be restored and to go on since this was asked last.
    pub fn take_steps(&self) -> Vec<Step> {
        self.stopwatch().take()
    }

    /// Stops the guest at an instruction boundary, then its devices; nothing touches its memory any more.
    ///
    /// # Errors
    /// When something has not come to rest in time. It has been told to, and what could be stopped is paused:
    /// [`Machine::resume`] lets all of it go on.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut running = locked(&self.running);
        *running = false;
        self.stopwatch().take();
        self.stopwatch().time_named(Work::Stop, VCPUS, || self.vcpus.pause(PAUSE_LIMIT))?;
        self.devices.pause(PAUSE_LIMIT)?;
        // Behind the instruction that asked for a reset there is nothing to go on with, here or elsewhere.
        if self.end_reason().is_some() { Err(MachineError::Stopped) } else { Ok(()) }
    }

    /// Has the devices take a step of the guest's way to another host, or back.
    ///
    /// # Errors
    /// When one cannot, or has not in time.
    pub fn hand_over(&self, step: Handover) -> Result<(), MachineError> {
        let limit = if step == Handover::Prepare { PREPARE_LIMIT } else { PAUSE_LIMIT };
        Ok(self.devices.hand_over(step, limit)?)
    }

    /// Asks the guest to stop, and waits for nothing; whether it is paused. To be called until it is.
    pub fn try_pause(&self) -> bool {
        let mut running = locked(&self.running);
        *running = false;
        self.vcpus.try_pause() && self.devices.pause(Duration::ZERO).is_ok()
    }

    /// Whether the guest has been told to run.
    pub fn is_running(&self) -> bool {
        *locked(&self.running)
    }

    /// Readable once the guest has stopped by itself; then [`Machine::end_reason`] says why.
    pub fn end_event(&self) -> &EventFd {
        self.vcpus.end().event()
    }

    /// Ends the guest for a reason of the host's.
    pub fn fail(&self, why: String) {
        self.vcpus.end().replace(StopReason::Failed(why));
    }

    /// Why the guest stopped by itself.
    pub fn end_reason(&self) -> Option<StopReason> {
        self.vcpus.end().reason()
    }

    /// What another host must offer.
    pub fn describe(&self) -> MachineSpec {
        MachineSpec {
            ram: self.ram().layout().clone(),
            cpus: self.cpus(),
            processor: self.vcpus.processor().clone(),
            devices: self.devices.describe(),
        }
    }

    /// Starts logging the guest's writes and the monitor's own.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn start_dirty_log(&self) -> Result<(), MachineError> {
        self.ram().take_own_writes();
        Ok(self.vm.start_dirty_log()?)
    }

    /// The pages written by guest or monitor since the last call or the start.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn take_dirty_log(&self) -> Result<PageSet, MachineError> {
        let mut dirty = self.vm.take_dirty_log()?;
        dirty.insert_all(&self.ram().take_own_writes());
        Ok(dirty)
    }

    /// Stops logging the guest's writes.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn stop_dirty_log(&self) -> Result<(), MachineError> {
        Ok(self.vm.stop_dirty_log()?)
    }

    /// Reads everything but RAM. The machine is paused.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        // An interrupt goes from a device to the I/O APIC, or from the kernel's timer, and from there to a local APIC: read in this order, one
        // that is on its way is found further on. The clocks last, when nothing else is read any more.
        let mut devices = self.devices.save()?;
        let mut records = vec![Record::of(state::VM, &self.vm.save()?)?];
        for (index, vcpu) in self.vcpus.save()?.iter().enumerate() {
            records.push(Record::of(&state::vcpu(index), vcpu)?);
        }
        records.push(Record::of(state::TIME, &self.vcpus.save_time(&self.vm)?)?);
        records.append(&mut devices);
        Ok(MachineState { running: self.is_running(), records: Records(records) })
    }

    /// Writes everything but RAM. The machine is paused. Nothing is written before all of it has been read.
    ///
    /// # Errors
    /// When it is not the state of exactly this machine's parts, or KVM refuses.
    pub fn restore(&self, state: &MachineState) -> Result<(), MachineError> {
        let mut parts = state.records.by_part()?;
        let (vm, time): (VmState, Time) = (parts.read(state::VM)?, parts.read(state::TIME)?);
        if time.tscs.len() != self.vcpus.len() {
            let (id, kind) = (state::TIME.try_into()?, Time::KIND.try_into()?);
            let why = format!("it has {} time stamp counters for {} vCPUs", time.tscs.len(), self.vcpus.len());
            return Err(RecordError::Bytes { id, kind, version: Time::VERSION, why }.into());
        }
        let vcpus: Result<Vec<VcpuState>, _> = (0..self.vcpus.len()).map(|i| parts.read(&state::vcpu(i))).collect();
        let (vcpus, devices) = (vcpus?, self.devices.check(&mut parts)?);
        parts.finish()?;
        let stopwatch = self.stopwatch();
        // Time before the vCPUs, whose timers wait for it; local APICs before the I/O APIC, which sends them what waits in it, and that before
        // the devices, which raise what they have.
        stopwatch.time_named(Work::Restore, state::TIME, || self.vcpus.restore_time(&self.vm, &time))?;
        stopwatch.time_named(Work::Restore, VCPUS, || self.vcpus.restore(&vcpus))?;
        stopwatch.time_named(Work::Restore, state::VM, || self.vm.restore(&vm))?;
        Ok(self.devices.restore(&devices)?)
    }
}

/// A lock whose holder panicked still guards data that is whole: every update here is one assignment.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
