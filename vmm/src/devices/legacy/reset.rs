//! The two registers by which a guest ends: the keyboard controller's reset line and ACPI's sleep control.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::arch::x86_64::layout::{KEYBOARD_PORTS, PM1A_CONTROL_PORTS};
use crate::devices::host::Host;
use crate::devices::{Device, DeviceDescription, DeviceError, RegisterAccess, StopReason};
use crate::record::{Record, RecordError, Saved};

/// i8042 command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
/// `SLP_EN` in PM1a control (ACPI specification 4.8.3.2.1).
const SLEEP_ENABLE: u16 = 1 << 13;

/// What is saved of the reset line: it holds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct SavedResetLine;

impl Saved for SavedResetLine {
    const KIND: &'static str = "reset-i8042";
    const VERSION: u16 = 1;
}

/// What is saved of the sleep control: it holds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct SavedPowerControl;

impl Saved for SavedPowerControl {
    const KIND: &'static str = "power-acpi";
    const VERSION: u16 = 1;
}

/// The keyboard controller's command port; there is no keyboard.
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
        vec![(KEYBOARD_PORTS, self)]
    }
}

impl RegisterAccess for ResetLine {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) -> Option<StopReason> {
        (data.first() == Some(&PULSE_RESET)).then_some(StopReason::Reset)
    }
}

/// ACPI PM1a control: any sleep type is taken for S5, off.
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
        vec![(PM1A_CONTROL_PORTS, self)]
    }
}

impl RegisterAccess for PowerControl {
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
