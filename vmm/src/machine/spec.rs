//! What the guest sees of a machine, whichever host it is on, and why a host cannot be it. What the host gives to that is
//! in [`Backends`](crate::devices::host::Backends), and stays.

use memory_agent::ByteSize;
use serde::{Deserialize, Serialize};

use crate::arch::x86_64::Processor;
use crate::bounded::at_most;
use crate::devices::{DeviceDescription, DeviceError, table};
use crate::kvm::{self, KvmError};
use crate::ram::RamLayout;

/// Most devices of a machine.
const MAX_DEVICES: usize = 256;

/// A machine as its guest sees it: what another host must be able to be. It travels with the offer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineSpec {
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

/// Why this host cannot be a machine.
#[derive(Debug, thiserror::Error)]
pub enum Incompatibility {
    /// It has more memory than it may have here.
    #[error("the machine has {asked} of memory, this host takes {most} at most")]
    Memory {
        /// What it has.
        asked: ByteSize,
        /// What it may have.
        most: ByteSize,
    },
    /// Its memory is elsewhere than that of machines here.
    #[error("the machine's memory is laid out in a way that cannot be here")]
    Layout,
    /// It has no vCPU.
    #[error("the machine has no vCPU")]
    NoCpu,
    /// It has too many vCPUs.
    #[error("it has {asked} vCPUs, this host's KVM allows {most}")]
    Cpus {
        /// What it has.
        asked: u8,
        /// What there can be.
        most: usize,
    },
    /// Its processor is another one.
    #[error("{0}")]
    Processor(String),
    /// It has a device that cannot be made.
    #[error("{0}")]
    Device(DeviceError),
}

impl MachineSpec {
    /// Every reason why this host cannot be this machine with `most` memory; the first ones alone where others could not be
    /// told.
    ///
    /// # Errors
    /// When KVM does not say what it can do.
    pub fn incompatibilities(&self, most: ByteSize) -> Result<Vec<Incompatibility>, KvmError> {
        let bytes = self.ram.bytes();
        if ByteSize(bytes) > most {
            return Ok(vec![Incompatibility::Memory { asked: ByteSize(bytes), most }]);
        }
        if bytes == 0 || self.ram != RamLayout::new(bytes) {
            return Ok(vec![Incompatibility::Layout]);
        }
        if self.cpus == 0 {
            return Ok(vec![Incompatibility::NoCpu]);
        }
        let kvm = kvm_ioctls::Kvm::new().map_err(KvmError::Open)?;
        let processor = self.processor.incompatibilities(&kvm::supported_cpuid(&kvm)?, &kvm::features(&kvm)?);
        let mut all: Vec<_> = processor.into_iter().map(Incompatibility::Processor).collect();
        let most = kvm.get_max_vcpus();
        if usize::from(self.cpus) > most {
            all.push(Incompatibility::Cpus { asked: self.cpus, most });
        }
        all.extend(table::unknown(&self.devices).into_iter().map(Incompatibility::Device));
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(ram: RamLayout, cpus: u8) -> MachineSpec {
        let processor = Processor { cpuid: Vec::new(), features: Vec::new(), tsc_khz: 1 };
        MachineSpec { ram, cpus, processor, devices: table::standard().unwrap() }
    }

    #[test]
    fn what_no_host_can_be_is_refused_before_kvm_is_asked() {
        let most = ByteSize::mib(64);
        let refused = |spec: MachineSpec| spec.incompatibilities(most).unwrap().remove(0);
        let large = refused(spec(RamLayout::new(65 << 20), 1));
        assert!(matches!(large, Incompatibility::Memory { asked, .. } if asked == ByteSize::mib(65)));
        assert!(matches!(refused(spec(RamLayout::new(0), 1)), Incompatibility::Layout));
        let layout = serde_json::json!({ "regions": [{ "start": 4096, "length": 1 << 20 }] });
        assert!(matches!(refused(spec(serde_json::from_value(layout).unwrap(), 1)), Incompatibility::Layout));
        assert!(matches!(refused(spec(RamLayout::new(64 << 20), 0)), Incompatibility::NoCpu));
    }
}
