//! How a machine is made: a new one, or one that has been somewhere already.

use std::sync::Arc;

use memory_agent::ByteSize;

use super::{Incompatibility, Machine, MachineError, MachineSpec};
use crate::arch::x86_64::cpuid::CpuModel;
use crate::devices::DeviceDescription;
use crate::devices::host::Backends;
use crate::kvm::{KvmError, Told};
use crate::ram::GuestRam;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// This host cannot be this machine.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Incompatible(Vec<Incompatibility>),
    /// The host refuses.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Makes one machine out of what this host gives.
#[derive(Debug, Default)]
pub struct Builder {
    backends: Backends,
}

impl Builder {
    /// With these back-ends.
    pub fn new(backends: Backends) -> Self {
        Self { backends }
    }

    /// A new machine with a processor of this model and these devices. It has nothing to run yet.
    ///
    /// # Errors
    /// When the host does not give what it takes.
    pub fn new_machine(
        self,
        memory: ByteSize,
        cpus: u8,
        cpu: CpuModel,
        devices: &[DeviceDescription],
    ) -> Result<Machine, MachineError> {
        let ram = GuestRam::new(memory.bytes())?;
        Machine::new(Arc::new(ram), cpus, Told::Model(cpu), devices, &self.backends)
    }

    /// A machine that has been somewhere already, with `most` memory: all but what it holds.
    ///
    /// # Errors
    /// When this host cannot be it.
    pub fn described(self, spec: &MachineSpec, most: ByteSize) -> Result<Machine, BuildError> {
        let mut reasons = spec.incompatibilities(most).map_err(MachineError::from)?;
        reasons.extend(self.backends.superfluous(&spec.devices).into_iter().map(Incompatibility::Device));
        if !reasons.is_empty() {
            return Err(BuildError::Incompatible(reasons));
        }
        let ram = GuestRam::new(spec.ram.bytes()).map_err(MachineError::from)?;
        let made = Machine::new(Arc::new(ram), spec.cpus, Told::Before(&spec.processor), &spec.devices, &self.backends);
        made.map_err(|e| match e {
            MachineError::Device(e) => BuildError::Incompatible(vec![Incompatibility::Device(e)]),
            // Of a processor that is only described, the MSRs are its features.
            MachineError::Kvm(e @ (KvmError::TscFrequency { .. } | KvmError::Msr { .. })) => {
                BuildError::Incompatible(vec![Incompatibility::Processor(e.to_string())])
            }
            e => BuildError::Machine(e),
        })
    }
}
