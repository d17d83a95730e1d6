//! A machine: RAM, KVM and devices put together.

mod state;

pub use state::MachineState;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use memory_agent::{AgentError, AgentOptions};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::state::{VcpuState, VmState};
use crate::arch::x86_64::{Processor, cpuid};
use crate::boot::{self, BootError, Kernel, pvh};
use crate::bounded::at_most;
use crate::devices::reset::{ACPI_PM1A_PORTS, KEYBOARD_PORTS, PowerControl, ResetLine};
use crate::devices::serial::{COM1_IRQ, COM1_PORTS, Com1, ConsoleOutput, SavedSerial, SerialError};
use crate::devices::{Bus, DeviceDescription, SharedDevice};
use crate::kvm::{self, KvmError, VcpuExitReason, Vcpus, Vm};
use crate::migration::wire::RefusalReason;
use crate::ram::{GuestRam, PageSet, RamError, RamLayout, RamWatch};
use crate::record::{Record, RecordError, Records, Saved};

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
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// Saved state.
    #[error(transparent)]
    State(#[from] RecordError),
    /// What was saved cannot be shown.
    #[error("the machine's state cannot be written as JSON: {0}")]
    Json(serde_json::Error),
}

impl MachineError {
    /// Whether saved state is what is wrong, rather than this host.
    pub fn is_of_state(&self) -> bool {
        match self {
            Self::State(_) | Self::Serial(SerialError::Saved(_)) => true,
            Self::Kvm(e) => matches!(e, KvmError::Msrs(_) | KvmError::Msr { .. } | KvmError::ExtendedState(_)),
            _ => false,
        }
    }
}

/// What another host must be able to offer to take this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// RAM.
    pub ram: RamLayout,
    /// Number of vCPUs.
    pub cpus: u8,
    /// What the guest was told of its processor.
    pub processor: Processor,
    /// The devices.
    #[serde(deserialize_with = "at_most::<_, _, MAX_DEVICES>")]
    pub devices: Vec<DeviceDescription>,
}

/// Most devices of a machine.
const MAX_DEVICES: usize = 256;

/// The devices that every machine has.
fn devices() -> Result<Vec<DeviceDescription>, RecordError> {
    Ok(vec![DeviceDescription {
        id: state::SERIAL.try_into()?,
        kind: SavedSerial::KIND.try_into()?,
        version: SavedSerial::VERSION,
    }])
}

/// A machine. It stands still until [`Machine::resume`].
#[derive(Debug)]
pub struct Machine {
    // vCPU threads end before what they use goes.
    vcpus: Vcpus,
    vm: Vm,
    com1: Com1,
    devices: Vec<DeviceDescription>,
    running: Mutex<bool>,
    watch: OnceLock<RamWatch>,
}

impl Machine {
    /// A machine whose vCPUs have not been told where to begin. They are this processor, or what the host has.
    ///
    /// # Errors
    /// When the host cannot offer what it takes.
    pub fn new(
        ram: Arc<GuestRam>,
        cpus: u8,
        processor: Option<&Processor>,
        console: ConsoleOutput,
    ) -> Result<Self, MachineError> {
        let vm = Vm::new(ram)?;
        let (com1, irq) = Com1::new(console)?;
        vm.register_irq(&irq, COM1_IRQ)?;
        let reset: SharedDevice = Arc::new(Mutex::new(ResetLine));
        let power: SharedDevice = Arc::new(Mutex::new(PowerControl));
        let bus = Bus::new(vec![(COM1_PORTS, com1.device()), (KEYBOARD_PORTS, reset), (ACPI_PM1A_PORTS, power)]);
        let vcpus = Vcpus::new(&vm, &bus, cpus, processor)?;
        Ok(Self { vcpus, vm, com1, devices: devices()?, running: Mutex::new(false), watch: OnceLock::new() })
    }

    /// Loads a kernel and points the first vCPU at it.
    ///
    /// # Errors
    /// When the kernel cannot be loaded.
    pub fn boot(&self, kernel: &Kernel) -> Result<(), MachineError> {
        let entry = boot::load(kernel, self.ram(), self.cpus())?;
        self.vcpus.with_fd(0, |fd| {
            let mut sregs = fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
            let mut regs = fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?;
            pvh::set_entry_registers(entry, &mut regs, &mut sregs);
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

    /// The console's port.
    pub fn com1(&self) -> &Com1 {
        &self.com1
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u8 {
        self.vcpus.len() as u8
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        let mut running = locked(&self.running);
        self.vcpus.resume();
        *running = true;
    }

    /// Stops the guest at an instruction boundary.
    pub fn pause(&self) {
        let mut running = locked(&self.running);
        self.vcpus.pause();
        *running = false;
    }

    /// Whether the guest has been told to run.
    pub fn is_running(&self) -> bool {
        *locked(&self.running)
    }

    /// Readable once the guest has stopped by itself; then [`Machine::end_reason`] says why.
    pub fn end_event(&self) -> &EventFd {
        self.vcpus.end().event()
    }

    /// Why the guest stopped by itself.
    pub fn end_reason(&self) -> Option<VcpuExitReason> {
        self.vcpus.end().reason()
    }

    /// What another host must offer.
    pub fn describe(&self) -> MachineDescription {
        MachineDescription {
            ram: self.ram().layout().clone(),
            cpus: self.cpus(),
            processor: self.vcpus.processor().clone(),
            devices: self.devices.clone(),
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

    /// Reads everything but RAM. The machine stands.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        // The clock with the vCPUs' counters, as close together as can be: guests compute one from the other.
        let vcpus = self.vcpus.save()?;
        let mut records = vec![Record::of(state::VM, &self.vm.save()?)?];
        for (index, vcpu) in vcpus.iter().enumerate() {
            records.push(Record::of(&state::vcpu(index), vcpu)?);
        }
        records.push(Record::of(state::SERIAL, &self.com1.save())?);
        Ok(MachineState { running: self.is_running(), records: Records(records) })
    }

    /// Writes everything but RAM. The machine stands. Nothing is written before all of it has been read.
    ///
    /// # Errors
    /// When it is not the state of exactly this machine's parts, or KVM refuses.
    pub fn restore(&self, state: &MachineState) -> Result<(), MachineError> {
        let mut parts = state.records.by_part()?;
        let vm: VmState = parts.read(state::VM)?;
        let vcpus: Result<Vec<VcpuState>, _> = (0..self.vcpus.len()).map(|i| parts.read(&state::vcpu(i))).collect();
        let (vcpus, serial): (_, SavedSerial) = (vcpus?, parts.read(state::SERIAL)?);
        parts.finish()?;
        self.vm.restore(&vm)?;
        self.vcpus.restore(&vcpus)?;
        Ok(self.com1.restore(&serial)?)
    }
}

/// A lock whose holder panicked still guards data that is whole: every update here is one assignment.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why this host cannot take a machine: class and line for each reason, none when it can.
///
/// # Errors
/// When KVM does not say what it can do.
pub fn obstacles(description: &MachineDescription) -> Result<Vec<(RefusalReason, String)>, KvmError> {
    let kvm = kvm_ioctls::Kvm::new().map_err(KvmError::Open)?;
    let mut reasons: Vec<_> = cpuid::obstacles(&description.processor.cpuid, &kvm::supported_cpuid(&kvm)?)
        .into_iter()
        .map(|text| (RefusalReason::Cpu, text))
        .collect();
    let most = kvm.get_max_vcpus();
    if usize::from(description.cpus) > most {
        let text = format!("it has {} vCPUs, this host's KVM allows {most}", description.cpus);
        reasons.push((RefusalReason::Cpu, text));
    }
    for device in description.devices.iter().filter(|device| !is_known(device)) {
        let DeviceDescription { id, kind, version } = device;
        let text = format!(
            "it has a device '{id}' of kind '{kind}' with state of version {version}, which this program does not know"
        );
        reasons.push((RefusalReason::Devices, text));
    }
    Ok(reasons)
}

fn is_known(device: &DeviceDescription) -> bool {
    device.kind.as_str() == SavedSerial::KIND && device.version == SavedSerial::VERSION
}
