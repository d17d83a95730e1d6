//! A machine as the user describes it, checked once at the door.

pub mod balloon;
mod disk;

pub use disk::{DiskConfig, DiskError};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use memory_agent::{ByteSize, PAGE_SIZE};

use crate::arch::x86_64::cpuid::CpuModel;
use crate::boot::{Kernel, Payload};
use crate::devices::virtio::balloon::BalloonConfig;
use crate::devices::virtio::block::DiskBackend;
use crate::devices::virtio::net::{self, NetConfig};
use crate::devices::virtio::vsock::{self, VsockConfig};
use crate::devices::virtio::{console, rng};
use crate::devices::{DeviceDescription, DeviceError, table};
use crate::host;
use crate::ram::layout::MAX_RAM;
use crate::record::Name;

/// Guest memory, where nobody says how much.
pub const DEFAULT_MEMORY: ByteSize = ByteSize::mib(256);
/// Number of vCPUs, where nobody says how many.
pub const DEFAULT_CPUS: u8 = 1;
/// What boots, where nobody says what.
pub const DEFAULT_KERNEL: &str = "workload";

/// The least memory: what the boot structures and a small kernel need.
const MIN_RAM: ByteSize = ByteSize::mib(16);
/// The most vCPUs: each needs an APIC id below 255.
pub const MAX_CPUS: u8 = 255;
/// The most vCPUs that the embedded workload uses.
const WORKLOAD_CPUS: u8 = 2;

/// Why a machine cannot be as it is described.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not whole pages.
    #[error("{0} bytes of memory is not a multiple of the page size, 4096 bytes")]
    PartialPage(u64),
    /// Too little.
    #[error("{0} of memory is too little, {MIN_RAM} is the least")]
    TooSmall(ByteSize),
    /// More than there is.
    #[error("{asked} of memory is more than this host has ({host} of memory and swap); ask for less, or add swap")]
    LargerThanHost {
        /// What was asked for.
        asked: ByteSize,
        /// What there is.
        host: ByteSize,
    },
    /// More than the address space has.
    #[error("{0} of memory is more than a machine can have")]
    TooLarge(ByteSize),
    /// Too many or no vCPUs.
    #[error("{asked} vCPUs are not possible: 1 to {most}{why}", why = if *.most == WORKLOAD_CPUS { " with the embedded workload" } else { "" })]
    Cpus {
        /// What was asked for.
        asked: u8,
        /// The most.
        most: u8,
    },
    /// The workload's options do not fit the memory.
    #[error(
        "the workload needs {needs} for its working set and cold pages, and the machine has {memory} of memory; 16 MiB more than the two together is enough"
    )]
    Workload {
        /// Working set and cold pages.
        needs: ByteSize,
        /// The machine's memory.
        memory: ByteSize,
    },
    /// Something is at the API socket's path.
    #[error("{path} exists already: another thermocline may be using it; choose another path, or remove it if nothing does", path = .0.display())]
    SocketExists(PathBuf),
}

/// A machine that can be.
#[derive(Clone, Debug, PartialEq)]
pub struct VmConfig {
    /// Guest RAM.
    pub memory: ByteSize,
    /// Number of vCPUs.
    pub cpus: u8,
    /// What the guest is told of its processor.
    pub cpu: CpuModel,
    /// What boots.
    pub payload: Payload,
    /// Whether the host gives its randomness.
    pub rng: bool,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonConfig>,
    /// Whether there is a virtio console.
    pub console: bool,
    /// Network interfaces by their ids.
    pub nets: Vec<(Name, NetConfig)>,
    /// Sockets to the host, if there are some.
    pub vsock: Option<VsockConfig>,
    /// The control socket, if any.
    pub api_socket: Option<PathBuf>,
}

impl VmConfig {
    /// Checks everything that can be checked before anything is made.
    ///
    /// # Errors
    /// The first thing that cannot be.
    pub fn validate(self) -> Result<Self, ConfigError> {
        let bytes = self.memory.bytes();
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(ConfigError::PartialPage(bytes));
        }
        if self.memory < MIN_RAM {
            return Err(ConfigError::TooSmall(self.memory));
        }
        if bytes > MAX_RAM {
            return Err(ConfigError::TooLarge(self.memory));
        }
        if let Some(host) = host::memory_and_swap().filter(|host| self.memory > *host) {
            return Err(ConfigError::LargerThanHost { asked: self.memory, host });
        }
        let most = if matches!(self.payload.kernel, Kernel::Workload(_)) { WORKLOAD_CPUS } else { MAX_CPUS };
        if !(1..=most).contains(&self.cpus) {
            return Err(ConfigError::Cpus { asked: self.cpus, most });
        }
        if let Kernel::Workload(options) = &self.payload.kernel {
            let needs = ByteSize(options.working_set.saturating_add(options.cold));
            if needs.bytes().saturating_add(4 << 20) > bytes {
                return Err(ConfigError::Workload { needs, memory: self.memory });
            }
        }
        check_socket(self.api_socket.as_deref())?;
        Ok(self)
    }

    /// What its guest sees of devices, in the order in which they come: those that every machine has, then what was asked for.
    ///
    /// # Errors
    /// When one cannot be on this host, such as a disk whose image is missing.
    pub fn devices(&self) -> Result<Vec<DeviceDescription>, DiskError> {
        let mut devices = table::standard().map_err(DeviceError::from)?;
        if self.rng {
            devices.push(table::describe("rng0", rng::KIND).map_err(DeviceError::from)?);
        }
        for (id, disk) in DiskConfig::named(&self.disks)? {
            devices.push(disk.describe(&id)?);
        }
        for (id, config) in &self.nets {
            let net = table::describe(id.as_str(), net::KIND).map_err(DeviceError::from)?;
            devices.push(net.with_config(config)?);
        }
        if let Some(balloon) = &self.balloon {
            devices.push(balloon::describe(balloon)?);
        }
        if self.console {
            devices.push(table::describe(table::CONSOLE, console::KIND).map_err(DeviceError::from)?);
        }
        if let Some(vsock) = &self.vsock {
            let described = table::describe(table::VSOCK, vsock::KIND).map_err(DeviceError::from)?;
            devices.push(described.with_config(vsock)?);
        }
        Ok(devices)
    }

    /// What this host gives for the disks.
    ///
    /// # Errors
    /// When two have one id or one image.
    pub fn disk_backends(&self) -> Result<BTreeMap<Name, DiskBackend>, DiskError> {
        Ok(DiskConfig::named(&self.disks)?.into_iter().map(|(id, disk)| (id, disk.backend)).collect())
    }
}

/// A socket is made only where nothing is.
///
/// # Errors
/// When something is there.
pub fn check_socket(path: Option<&Path>) -> Result<(), ConfigError> {
    match path {
        Some(path) if path.symlink_metadata().is_ok() => Err(ConfigError::SocketExists(path.into())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(kernel: &str) -> Payload {
        Payload { kernel: kernel.parse().unwrap(), initramfs: None, command_line: None }
    }

    fn config(memory: ByteSize) -> VmConfig {
        VmConfig {
            memory,
            cpus: 1,
            cpu: CpuModel::Host,
            payload: payload("workload"),
            rng: true,
            disks: Vec::new(),
            balloon: None,
            console: false,
            nets: Vec::new(),
            vsock: None,
            api_socket: None,
        }
    }

    #[test]
    fn what_can_be_is_accepted() {
        assert!(config(ByteSize::mib(64)).validate().is_ok());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(config(ByteSize(64 << 20 | 5)).validate(), Err(ConfigError::PartialPage(64 << 20 | 5)));
        assert!(matches!(config(ByteSize(4096)).validate(), Err(ConfigError::TooSmall(_))));
        assert!(matches!(config(ByteSize(1 << 39)).validate(), Err(ConfigError::LargerThanHost { .. })));
        assert!(matches!(config(ByteSize(2 << 40)).validate(), Err(ConfigError::TooLarge(_))));
        let cpus = VmConfig { cpus: 0, ..config(ByteSize::mib(64)) };
        assert!(matches!(cpus.validate(), Err(ConfigError::Cpus { .. })));
        let workload = VmConfig { payload: payload("workload:cold=1GiB"), ..config(ByteSize::mib(64)) };
        assert!(matches!(workload.validate(), Err(ConfigError::Workload { .. })));
        let socket = VmConfig { api_socket: Some("/dev/null".into()), ..config(ByteSize::mib(64)) };
        assert!(matches!(socket.validate(), Err(ConfigError::SocketExists(_))));
    }
}
