//! What is saved of a VM and its vCPUs: types of our own, apart from those of the kernel, which may change with it.
//!
//! Fields are named as in Linux's `arch/x86/include/uapi/asm/kvm.h` where they are the same, so that either can be read
//! beside the other; what KVM keeps as a byte and is yes or no is a `bool`, and padding does not travel.

mod events;
mod irqchip;
mod registers;
mod time;

pub use events::{Events, Exception, Interrupt, Nmi, Smi};
pub use irqchip::{IoApic, Pic, Pit, PitChannel};
pub use registers::{DebugRegisters, DescriptorTable, GeneralRegisters, MpState, Segment, SpecialRegisters, Xcr};
pub use time::Time;

use serde::{Deserialize, Serialize};

use super::msrs::Msr;
use crate::bounded::{Block, at_most};
use crate::record::Saved;

/// Most words of extended state: 64 KiB, five times what AMX's tiles and all before them take.
const MAX_XSAVE: usize = 1 << 14;
/// Most extended control registers: `KVM_MAX_XCRS`.
const MAX_XCRS: usize = 16;
/// Most model-specific registers; KVM lists some hundred and fifty.
const MAX_MSRS: usize = 4096;

/// The VM's own devices in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// The two PICs, master first.
    pub pics: [Pic; 2],
    /// The I/O APIC.
    pub io_apic: IoApic,
    /// The programmable interval timer.
    pub pit: Pit,
}

impl Saved for VmState {
    const KIND: &'static str = "kvm-x86_64";
    const VERSION: u16 = 1;
}

/// One vCPU. What it has been told of its processor is not here but in the machine's description
/// ([`Processor`](super::Processor)), which was agreed on before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// Running, halted, waiting for INIT or SIPI.
    pub mp_state: MpState,
    /// General registers.
    pub regs: GeneralRegisters,
    /// Segment, control and table registers.
    pub sregs: SpecialRegisters,
    /// Extended state (x87, SSE, AVX, …) in the standard XSAVE format, as 32-bit words: Intel SDM volume 1, chapter 13.
    #[serde(deserialize_with = "at_most::<_, _, MAX_XSAVE>")]
    pub xsave: Vec<u32>,
    /// Extended control registers.
    #[serde(deserialize_with = "at_most::<_, _, MAX_XCRS>")]
    pub xcrs: Vec<Xcr>,
    /// Debug registers.
    pub debug_regs: DebugRegisters,
    /// Local APIC: its register page's first KiB, Intel SDM volume 3, "Local APIC Register Address Map".
    pub lapic: Block<1024>,
    /// Pending exceptions and interrupts.
    pub events: Events,
    /// Every model-specific register that this vCPU has and a guest can have here, but for its time stamp counter, which is in [`Time`],
    /// and for what was agreed on before.
    #[serde(deserialize_with = "at_most::<_, _, MAX_MSRS>")]
    pub msrs: Vec<Msr>,
}

impl Saved for VcpuState {
    const KIND: &'static str = "vcpu-x86_64";
    const VERSION: u16 = 1;

    fn validate(&self) -> Result<(), String> {
        self.sregs.validate()
    }
}
