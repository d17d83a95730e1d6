//! PCI: one bus with up to 32 devices of one function, memory BARs of 32 bits in one window, MSI-X, and no interrupt lines
//! (PCI Local Bus Specification 3.0; PCI Express Base Specification for the enhanced configuration access).
//!
//! | to read about | open |
//! |---|---|
//! | a function's configuration space and its BARs | `config_space.rs` |
//! | which function answers where | `bus.rs` |
//! | the ports and addresses at which the guest reaches the bus | `host_bridge.rs` |
//! | MSI-X: table, masks, pending bits | `msix.rs` |

mod bus;
mod config_space;
mod host_bridge;
pub(super) mod msix;

pub use bus::{PciBus, PciFunction};
pub use config_space::{CONFIG_BYTES, ConfigSpace, Identity};
pub use host_bridge::SavedHostBridge;
pub(super) use host_bridge::make;
pub use msix::{Msix, SavedMsix};
