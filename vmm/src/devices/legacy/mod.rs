//! Devices that a PC has had from the start, or as good as.

pub(super) mod reset;
pub mod serial;
