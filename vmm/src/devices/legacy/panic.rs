//! The port at which a guest's kernel says that it has panicked (QEMU, docs/specs/pvpanic.rst): ACPI names it `QEMU0001`.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::arch::x86_64::layout::PANIC_PORTS;
use crate::devices::host::Host;
use crate::devices::{Device, DeviceDescription, DeviceError, RegisterAccess, StopReason};
use crate::record::{Record, RecordError, Saved};

/// It has panicked.
const PANICKED: u8 = 1 << 0;
/// It has, and a kernel that keeps what there is of it runs now.
const CRASH_LOADED: u8 = 1 << 1;

/// What is saved of it: it holds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct SavedPanicPort;

impl Saved for SavedPanicPort {
    const KIND: &'static str = "pvpanic";
    const VERSION: u16 = 1;
}

#[derive(Debug)]
struct PanicPort(DeviceDescription);

pub(in crate::devices) fn make(description: &DeviceDescription, _: &mut Host) -> Result<Arc<dyn Device>, DeviceError> {
    Ok(Arc::new(PanicPort(description.clone())))
}

impl Device for PanicPort {
    fn description(&self) -> &DeviceDescription {
        &self.0
    }

    fn reset(&self) {}

    fn save(&self) -> Result<Record, RecordError> {
        Record::of(self.0.id.as_str(), &SavedPanicPort)
    }

    fn restore(&self, saved: &Record) -> Result<(), DeviceError> {
        let SavedPanicPort = saved.read()?;
        Ok(())
    }

    fn ports(self: Arc<Self>) -> Vec<(Range<u64>, Arc<dyn RegisterAccess>)> {
        vec![(PANIC_PORTS, Arc::new(Events))]
    }
}

/// The register: what can be said is read, what is said is written.
struct Events;

impl RegisterAccess for Events {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _: u64, data: &[u8]) -> Option<StopReason> {
        data.first().filter(|events| **events & PANICKED != 0).map(|_| StopReason::Panic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_guest_unless_it_takes_care_of_it_itself() {
        assert_eq!(Events.write(0, &[PANICKED]), Some(StopReason::Panic));
        assert_eq!(Events.write(0, &[CRASH_LOADED]), None);
        assert_eq!(Events.write(0, &[]), None);
    }
}
