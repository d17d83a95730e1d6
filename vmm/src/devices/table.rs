//! The one table of devices: what a kind is called, in which version it is saved, and how one is made.

use std::sync::Arc;

use super::host::Host;
use super::legacy::{panic, power_button, reset, serial};
use super::pci;
use super::virtio::pci::SavedVirtio;
use super::virtio::{self, VirtioDevice, balloon, block, console, net, rng, vsock};
use super::{Device, DeviceDescription, DeviceError};
use crate::record::{Record, RecordError, Saved};

/// Makes a device, at rest.
type Make = fn(&DeviceDescription, &mut Host) -> Result<Arc<dyn Device>, DeviceError>;
/// Makes what the transport makes a device of.
type MakeVirtio = fn(&DeviceDescription, &mut Host) -> Result<Arc<dyn VirtioDevice>, DeviceError>;

/// How a device is made.
#[derive(Clone, Copy)]
enum Made {
    Alone(Make),
    OverPci(MakeVirtio),
}

/// A kind of device.
pub(super) struct Kind {
    name: &'static str,
    version: u16,
    made: Made,
    show: fn(&Record, &Kind) -> Result<serde_json::Value, RecordError>,
    check: fn(&Record, &Kind) -> Result<(), RecordError>,
}

impl Kind {
    const fn of<S: Saved>(make: Make) -> Self {
        Self::saved_as::<S>(S::KIND, S::VERSION, Made::Alone(make))
    }

    /// A virtio device. The version is that of what transport and device save together.
    const fn virtio(name: &'static str, version: u16, make: MakeVirtio) -> Self {
        Self::saved_as::<SavedVirtio>(name, version, Made::OverPci(make))
    }

    const fn saved_as<S: Saved>(name: &'static str, version: u16, made: Made) -> Self {
        Self {
            name,
            version,
            made,
            show: |record, kind| record.show_as::<S>(kind.name, kind.version),
            check: |record, kind| record.read_as::<S>(kind.name, kind.version).map(drop),
        }
    }

    /// Makes one, at rest.
    pub(super) fn make(&self, device: &DeviceDescription, host: &mut Host) -> Result<Arc<dyn Device>, DeviceError> {
        match self.made {
            Made::Alone(make) => make(device, host),
            Made::OverPci(make) => virtio::pci::make(device, make(device, host)?, host),
        }
    }

    /// Reads what one has saved, and says whether it can be.
    pub(super) fn check(&self, record: &Record) -> Result<(), RecordError> {
        (self.check)(record, self)
    }
}

/// Every kind that there is.
const KINDS: &[Kind] = &[
    Kind::of::<serial::SavedSerial>(serial::make),
    Kind::of::<reset::SavedResetLine>(reset::make_reset_line),
    Kind::of::<reset::SavedPowerControl>(reset::make_power_control),
    Kind::of::<power_button::SavedPowerButton>(power_button::make),
    Kind::of::<panic::SavedPanicPort>(panic::make),
    Kind::of::<pci::SavedHostBridge>(pci::make),
    Kind::virtio(rng::KIND, 1, rng::make),
    Kind::virtio(block::KIND, 1, block::make),
    Kind::virtio(balloon::KIND, 1, balloon::make),
    Kind::virtio(console::KIND, 1, console::make),
    Kind::virtio(net::KIND, 1, net::make),
    Kind::virtio(vsock::KIND, 1, vsock::make),
];

/// The serial port of every machine.
pub const SERIAL: &str = "serial0";
/// The virtio console of those that have one.
pub const CONSOLE: &str = "console0";
/// The balloon of those that have one.
pub const BALLOON: &str = "balloon0";

/// The sockets of those that have some.
pub const VSOCK: &str = "vsock0";

/// The devices of every machine, by id and kind.
const STANDARD: &[(&str, &str)] = &[
    (SERIAL, serial::SavedSerial::KIND),
    ("reset0", reset::SavedResetLine::KIND),
    ("power0", reset::SavedPowerControl::KIND),
    ("button0", power_button::SavedPowerButton::KIND),
    ("panic0", panic::SavedPanicPort::KIND),
    ("pci0", pci::SavedHostBridge::KIND),
];

/// What a device of this description is.
pub(super) fn kind_of(device: &DeviceDescription) -> Result<&'static Kind, DeviceError> {
    let DeviceDescription { id, kind, version, .. } = device;
    let known = KINDS.iter().find(|known| known.name == kind.as_str() && known.version == *version);
    let unknown = || DeviceError::Unknown { id: id.clone(), kind: kind.clone(), version: *version };
    known.ok_or_else(unknown)
}

/// A virtio device without its transport.
///
/// # Errors
/// When there is no such kind of virtio device, or it cannot be made.
#[cfg(feature = "fuzzing")]
pub(crate) fn make_virtio(device: &DeviceDescription, host: &mut Host) -> Result<Arc<dyn VirtioDevice>, DeviceError> {
    match kind_of(device)?.made {
        Made::OverPci(make) => make(device, host),
        Made::Alone(_) => Err(device.refused(std::io::ErrorKind::Unsupported.into())),
    }
}

/// A device of this id and kind, with nothing else to be seen of it.
///
/// # Errors
/// When nothing can have that name.
pub fn describe(id: &str, kind: &str) -> Result<DeviceDescription, RecordError> {
    let version = KINDS.iter().find(|known| known.name == kind).map_or(0, |known| known.version);
    Ok(DeviceDescription { id: id.try_into()?, kind: kind.try_into()?, version, features: 0, config: Vec::new() })
}

/// The devices of every machine.
///
/// # Errors
/// None, as long as the table has names that can be.
pub fn standard() -> Result<Vec<DeviceDescription>, RecordError> {
    STANDARD.iter().map(|(id, kind)| describe(id, kind)).collect()
}

/// Why this program cannot make one of these devices, each that it cannot.
pub fn unknown(devices: &[DeviceDescription]) -> Vec<DeviceError> {
    devices.iter().filter_map(|device| kind_of(device).err()).collect()
}

/// What a device has saved, for people.
///
/// # Errors
/// When no device is of that kind and version, or it makes no sense.
pub fn show(record: &Record) -> Result<serde_json::Value, RecordError> {
    let known = KINDS.iter().find(|known| known.name == record.kind.as_str());
    let unknown = || RecordError::Unknown { id: record.id.clone(), kind: record.kind.clone() };
    let known = known.ok_or_else(unknown)?;
    (known.show)(record, known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_name_of_its_own_and_every_standard_device_a_kind() {
        for (number, kind) in KINDS.iter().enumerate() {
            assert!(KINDS[number + 1..].iter().all(|other| other.name != kind.name), "{}", kind.name);
        }
        assert!(unknown(&standard().unwrap()).is_empty());
    }
}
