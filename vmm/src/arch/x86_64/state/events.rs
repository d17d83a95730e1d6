//! `struct kvm_vcpu_events`: what is pending for a vCPU and what it is in the middle of delivering.

use serde::{Deserialize, Serialize};

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// An exception.
    pub exception: Exception,
    /// An interrupt.
    pub interrupt: Interrupt,
    /// A non-maskable interrupt.
    pub nmi: Nmi,
    /// Vector of the SIPI that has come, while the vCPU is [`SipiReceived`](super::MpState::SipiReceived).
    pub sipi_vector: u32,
    /// Which of the fields are to be taken: `KVM_VCPUEVENT_VALID_*`.
    pub flags: u32,
    /// System management mode.
    pub smi: Smi,
    /// A triple fault that has not been reported yet.
    pub triple_fault_pending: bool,
}

/// An exception that is being delivered or will be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exception {
    /// It is being delivered.
    pub injected: bool,
    /// Its vector.
    pub nr: u8,
    /// Whether it brings an error code.
    pub has_error_code: bool,
    /// It will be delivered; with [`Exception::payload`] that is not yet where it belongs.
    pub pending: bool,
    /// The error code.
    pub error_code: u32,
    /// What belongs into CR2 or DR6 on delivery.
    pub payload: Option<u64>,
}

/// An interrupt that is being delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupt {
    /// It is being delivered.
    pub injected: bool,
    /// Its vector.
    pub nr: u8,
    /// By an instruction.
    pub soft: bool,
    /// `KVM_X86_SHADOW_INT_*`: interrupts wait for the end of the next instruction.
    pub shadow: u8,
}

/// A non-maskable interrupt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nmi {
    /// It is being delivered.
    pub injected: bool,
    /// How many wait.
    pub pending: u8,
    /// The handler of one runs.
    pub masked: bool,
}

/// System management mode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Smi {
    /// The vCPU is in it.
    pub smm: bool,
    /// An SMI waits.
    pub pending: bool,
    /// It came while a non-maskable interrupt was handled.
    pub smm_inside_nmi: bool,
    /// An INIT waits for its end.
    pub latched_init: bool,
}
