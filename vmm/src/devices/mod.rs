//! Devices: each sees interrupts and its own registers, none sees migration.
//!
//! | kind | where it answers | file |
//! |---|---|---|
//! | `serial-16550a` | ports 0x3f8–0x3ff, interrupt line 4 | `legacy/serial.rs` |
//! | `reset-i8042` | port 0x64: the keyboard controller's reset line; port 0x60a: ACPI's reset register | `legacy/reset.rs` |
//! | `power-acpi` | ports 0x604–0x605: ACPI PM1a control, power off only; 0x608–0x609: sleep control and status | `legacy/reset.rs` |
//! | `power-button-acpi` | interrupt line 5 | `legacy/power_button.rs` |
//! | `pvpanic` | port 0x505 | `legacy/panic.rs` |
//! | `pci-host-bridge` | ports 0xcf8–0xcff, ECAM and the window for BARs | `pci/host_bridge.rs` |
//! | `virtio-…` | a slot of the PCI bus each, in the order in which they are described | `virtio/` |
//!
//! A machine's devices are made from their descriptions by [`table`]; nothing outside this folder names one.

mod bus;
mod device;
pub mod host;
pub mod legacy;
pub mod pci;
mod set;
mod stop_reason;
pub mod table;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;
pub mod virtio;

pub use bus::Bus;
pub use device::{Device, DeviceDescription, DeviceError, Handover, RegisterAccess, StillBusy};
pub use set::Devices;
pub use stop_reason::StopReason;
