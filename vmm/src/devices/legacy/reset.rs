//! The registers by which a guest resets its machine or switches it off: the keyboard controller's reset line and ACPI's
//! reset register; ACPI's sleep control register, and the PM1a control register of machines that have more of ACPI.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::arch::x86_64::layout::{
    KEYBOARD_PORTS, PM1A_CONTROL_PORTS, RESET_PORTS, RESET_VALUE, SLEEP_PORTS, SLEEP_TYPE_OFF,
};
use crate::devices::host::Host;
use crate::devices::{Device, DeviceDescription, DeviceError, RegisterAccess, StopReason};
use crate::record::{Record, RecordError, Saved};

/// i8042 command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
/// `SLP_EN` in PM1a control (ACPI 6.5, section 4.8.3.2.1).
const SLEEP_ENABLE: u16 = 1 << 13;
/// `SLP_EN` in the sleep control register (ACPI 6.5, section 4.8.4.1), and where `SLP_TYP` is.
const SLEEP_CONTROL_ENABLE: u8 = 1 << 5;
const SLEEP_CONTROL_TYPE: u8 = 2;

/// What is saved of the reset line: it holds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct SavedResetLine;

impl Saved for SavedResetLine {
    const KIND: &'static str = "reset-i8042";
    const VERSION: u16 = 2;
}

/// What is saved of the sleep control: it holds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct SavedPowerControl;

impl Saved for SavedPowerControl {
    const KIND: &'static str = "power-acpi";
    const VERSION: u16 = 2;
}

/// The keyboard controller's command port and ACPI's reset register; there is no keyboard.
#[derive(Debug)]
struct ResetLine(DeviceDescription);

pub(in crate::devices) fn make_reset_line(
    description: &DeviceDescription,
    _: &mut Host,
) -> Result<Arc<dyn Device>, DeviceError> {
    Ok(Arc::new(ResetLine(description.clone())))
}

impl Device for ResetLine {
    fn description(&self) -> &DeviceDescription {
        &self.0
    }

    fn reset(&self) {}

    fn save(&self) -> Result<Record, RecordError> {
        Record::of(self.0.id.as_str(), &SavedResetLine)
    }

    fn restore(&self, saved: &Record) -> Result<(), DeviceError> {
        let SavedResetLine = saved.read()?;
        Ok(())
    }

    fn ports(self: Arc<Self>) -> Vec<(Range<u64>, Arc<dyn RegisterAccess>)> {
        vec![(KEYBOARD_PORTS, Arc::new(ResetBy(PULSE_RESET))), (RESET_PORTS, Arc::new(ResetBy(RESET_VALUE)))]
    }
}

/// A register to which one value is written for a reset.
struct ResetBy(u8);

impl RegisterAccess for ResetBy {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) -> Option<StopReason> {
        (data.first() == Some(&self.0)).then_some(StopReason::Reset)
    }
}

/// ACPI's sleep registers.
#[derive(Debug)]
struct PowerControl(DeviceDescription);

pub(in crate::devices) fn make_power_control(
    description: &DeviceDescription,
    _: &mut Host,
) -> Result<Arc<dyn Device>, DeviceError> {
    Ok(Arc::new(PowerControl(description.clone())))
}

impl Device for PowerControl {
    fn description(&self) -> &DeviceDescription {
        &self.0
    }

    fn reset(&self) {}

    fn save(&self) -> Result<Record, RecordError> {
        Record::of(self.0.id.as_str(), &SavedPowerControl)
    }

    fn restore(&self, saved: &Record) -> Result<(), DeviceError> {
        let SavedPowerControl = saved.read()?;
        Ok(())
    }

    fn ports(self: Arc<Self>) -> Vec<(Range<u64>, Arc<dyn RegisterAccess>)> {
        vec![(PM1A_CONTROL_PORTS, Arc::new(Pm1aControl)), (SLEEP_PORTS, Arc::new(SleepControl))]
    }
}

/// PM1a control: any sleep type is taken for S5, off.
struct Pm1aControl;

impl RegisterAccess for Pm1aControl {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<StopReason> {
        let value = match (offset, data) {
            (0, [low, high]) => u16::from_le_bytes([*low, *high]),
            (1, [high]) => u16::from(*high) << 8,
            _ => 0,
        };
        (value & SLEEP_ENABLE != 0).then_some(StopReason::PowerOff)
    }
}

/// Sleep control, and sleep status behind it, which says nothing: nobody wakes up here.
struct SleepControl;

impl RegisterAccess for SleepControl {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<StopReason> {
        let value = data.first().copied().filter(|_| offset == 0)?;
        let off = value & SLEEP_CONTROL_ENABLE != 0 && value >> SLEEP_CONTROL_TYPE & 7 == SLEEP_TYPE_OFF;
        off.then_some(StopReason::PowerOff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_switches_off_by_either_register() {
        assert_eq!(Pm1aControl.write(0, &0x2000_u16.to_le_bytes()), Some(StopReason::PowerOff));
        assert_eq!(SleepControl.write(0, &[5 << 2 | 0x20]), Some(StopReason::PowerOff));
        for (offset, value) in [(0, 5 << 2), (0, 3 << 2 | 0x20), (0, 0x20), (1, 5 << 2 | 0x20), (1, 0x80)] {
            assert_eq!(SleepControl.write(offset, &[value]), None, "{value:#x} at {offset}");
        }
    }

    #[test]
    fn a_guest_resets_by_either_register() {
        assert_eq!(ResetBy(PULSE_RESET).write(0, &[0xfe]), Some(StopReason::Reset));
        assert_eq!(ResetBy(RESET_VALUE).write(0, &[1]), Some(StopReason::Reset));
        assert_eq!(ResetBy(RESET_VALUE).write(0, &[0xfe]), None);
        assert_eq!(ResetBy(RESET_VALUE).write(0, &[]), None);
    }
}
