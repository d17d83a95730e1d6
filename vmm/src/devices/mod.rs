//! Devices: each sees an interrupt line and its own registers, none sees migration.
//!
//! | ports | device | file |
//! |---|---|---|
//! | 0x64 | keyboard controller, reset line only | `reset.rs` |
//! | 0x3f8–0x3ff | COM1 | `serial.rs` |
//! | 0x604–0x605 | ACPI PM1a control, power off only | `reset.rs` |

mod bus;
pub mod reset;
pub mod serial;

pub use bus::{Bus, PortDevice, SharedDevice};

use serde::{Deserialize, Serialize};

use crate::record::Name;

/// A device as another host must be able to make it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// Which one, such as `serial0`.
    pub id: Name,
    /// What it is, such as `serial-16550a`.
    pub kind: Name,
    /// The version of what it saves.
    pub version: u16,
}
