//! The two registers by which a guest ends: the keyboard controller's reset line and ACPI's sleep control.

use std::ops::Range;

use super::PortDevice;
use crate::kvm::VcpuExitReason;

/// Command port of the i8042 keyboard controller.
pub const KEYBOARD_PORTS: Range<u16> = 0x64..0x65;
/// ACPI PM1a control register, where QEMU's machines have it.
pub const ACPI_PM1A_PORTS: Range<u16> = 0x604..0x606;

/// i8042 command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
/// `SLP_EN` in PM1a control (ACPI specification 4.8.3.2.1).
const SLEEP_ENABLE: u16 = 1 << 13;

/// The keyboard controller's command port; there is no keyboard.
#[derive(Debug, Default)]
pub struct ResetLine;

impl PortDevice for ResetLine {
    fn read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u16, data: &[u8]) -> Option<VcpuExitReason> {
        (data.first() == Some(&PULSE_RESET)).then_some(VcpuExitReason::Reset)
    }
}

/// ACPI PM1a control: any sleep type is taken for S5, off.
#[derive(Debug, Default)]
pub struct PowerControl;

impl PortDevice for PowerControl {
    fn read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<VcpuExitReason> {
        let value = match (offset, data) {
            (0, [low, high]) => u16::from_le_bytes([*low, *high]),
            (1, [high]) => u16::from(*high) << 8,
            _ => 0,
        };
        (value & SLEEP_ENABLE != 0).then_some(VcpuExitReason::PowerOff)
    }
}
