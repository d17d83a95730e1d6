//! A machine: RAM, KVM and devices put together.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::kvm_cpuid_entry2;
use memory_agent::{AgentError, AgentOptions};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootError, Kernel, pvh};
use crate::devices::reset::{ACPI_PM1A_PORTS, KEYBOARD_PORTS, PowerControl, ResetLine};
use crate::devices::serial::{COM1_IRQ, COM1_PORTS, Com1, ConsoleOutput, SavedSerial, SerialError};
use crate::devices::{Bus, SharedDevice};
use crate::kvm::state::{VcpuState, VmState};
use crate::kvm::{KvmError, VcpuExitReason, Vcpus, Vm, cpuid};
use crate::migration::wire::RefusalReason;
use crate::ram::{GuestRam, PageSet, RamError, RamLayout, RamWatch};

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
}

/// What another host must be able to offer to take this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// RAM.
    pub ram: RamLayout,
    /// Number of vCPUs.
    pub cpus: u8,
    /// What CPUID tells the first vCPU.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of the time stamp counter, kHz.
    pub tsc_khz: u32,
    /// The devices, by name and the version of what they save.
    pub devices: Vec<(String, u16)>,
}

/// Devices that every machine has, with the version of what they save.
const DEVICES: [(&str, u16); 1] = [("serial", 1)];

/// Everything of a machine but its RAM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// The devices in the kernel.
    pub vm: VmState,
    /// The vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// COM1.
    pub serial: SavedSerial,
    /// Whether the guest is to run once it is restored.
    pub running: bool,
}

/// A machine. It stands still until [`Machine::resume`].
#[derive(Debug)]
pub struct Machine {
    // vCPU threads end before what they use goes.
    vcpus: Vcpus,
    vm: Vm,
    com1: Com1,
    running: Mutex<bool>,
    watch: OnceLock<RamWatch>,
}

impl Machine {
    /// A machine whose vCPUs have not been told where to begin.
    ///
    /// # Errors
    /// When the host cannot offer what it takes.
    pub fn new(ram: Arc<GuestRam>, cpus: u8, console: ConsoleOutput) -> Result<Self, MachineError> {
        let vm = Vm::new(ram)?;
        let (com1, irq) = Com1::new(console)?;
        vm.register_irq(&irq, COM1_IRQ)?;
        let reset: SharedDevice = Arc::new(Mutex::new(ResetLine));
        let power: SharedDevice = Arc::new(Mutex::new(PowerControl));
        let bus = Bus::new(vec![(COM1_PORTS, com1.device()), (KEYBOARD_PORTS, reset), (ACPI_PM1A_PORTS, power)]);
        let vcpus = Vcpus::new(&vm, &bus, cpus)?;
        Ok(Self { vcpus, vm, com1, running: Mutex::new(false), watch: OnceLock::new() })
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
        let processor = self.vcpus.processor();
        MachineDescription {
            ram: self.ram().layout().clone(),
            cpus: self.cpus(),
            cpuid: processor.cpuid,
            tsc_khz: processor.tsc_khz,
            devices: DEVICES.iter().map(|(name, version)| ((*name).into(), *version)).collect(),
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
        Ok(MachineState { vm: self.vm.save()?, vcpus, serial: self.com1.save(), running: self.is_running() })
    }

    /// Writes everything but RAM. The machine stands.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, state: &MachineState) -> Result<(), MachineError> {
        self.vm.restore(&state.vm)?;
        self.vcpus.restore(&state.vcpus)?;
        Ok(self.com1.restore(&state.serial)?)
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
    let mut reasons: Vec<_> = cpuid::obstacles(&description.cpuid, &cpuid::supported(&kvm)?)
        .into_iter()
        .map(|text| (RefusalReason::Cpu, text))
        .collect();
    let most = kvm.get_max_vcpus();
    if usize::from(description.cpus) > most {
        let text = format!("it has {} vCPUs, this host's KVM allows {most}", description.cpus);
        reasons.push((RefusalReason::Cpu, text));
    }
    for (name, version) in &description.devices {
        if !DEVICES.contains(&(name.as_str(), *version)) {
            let text =
                format!("it has a device '{name}' with state of version {version}, which this program does not know");
            reasons.push((RefusalReason::Devices, text));
        }
    }
    Ok(reasons)
}
