//! Devices that a PC has had from the start, or as good as.

pub(super) mod panic;
pub mod power_button;
pub(super) mod reset;
pub mod serial;
