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
