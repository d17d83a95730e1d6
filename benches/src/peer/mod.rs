//! Monitors that Thermocline is compared with: as their users have them, with the same guest on the same KVM.

pub(crate) mod qemu;
pub(crate) mod qmp;
