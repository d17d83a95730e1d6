//! Registers of a vCPU.

use serde::{Deserialize, Serialize};

/// What a vCPU is doing: `KVM_MP_STATE_*`, those of x86.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MpState {
    /// It runs.
    Runnable,
    /// An application processor that has not had an INIT.
    Uninitialized,
    /// It has had an INIT and waits for a SIPI.
    InitReceived,
    /// It waits for an interrupt (`hlt`).
    Halted,
    /// It has just had a SIPI.
    SipiReceived,
    /// It waits for an INIT after a reset (SEV-ES).
    ApResetHold,
}

/// `struct kvm_regs`: the general registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as in every processor manual")]
pub struct GeneralRegisters {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// `struct kvm_segment`: a segment register with its hidden part; Intel SDM volume 3, "Segment Descriptors".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Linear address of its first byte.
    pub base: u64,
    /// Its last byte's offset.
    pub limit: u32,
    /// What the guest loaded.
    pub selector: u16,
    /// Type, 4 bits.
    #[serde(rename = "type")]
    pub type_: u8,
    /// Descriptor privilege level, 0 to 3.
    pub dpl: u8,
    /// P.
    pub present: bool,
    /// D/B: 32-bit.
    pub db: bool,
    /// S: code or data rather than a system segment.
    pub s: bool,
    /// L: 64-bit code.
    pub l: bool,
    /// G: the limit counts pages.
    pub g: bool,
    /// AVL: the guest's own bit.
    pub avl: bool,
    /// Loaded with a null selector.
    pub unusable: bool,
}

/// `struct kvm_dtable`: where a descriptor table is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Its last byte's offset.
    pub limit: u16,
}

/// `struct kvm_sregs2`: segment, table and control registers. The external interrupt that is being delivered, which `struct kvm_sregs` has
/// too, is in [`Events`](super::Events).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as in every processor manual")]
pub struct SpecialRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// Page directory pointers of a guest with PAE paging, which a processor reads when CR3 is loaded and not again; `None` for others,
    /// and where the host's kernel does not tell (Linux before 5.14).
    pub pdptrs: Option<[u64; 4]>,
}

/// `CR4.VMXE` and `EFER.SVME`: the guest is a hypervisor itself.
const CR4_VMXE: u64 = 1 << 13;
/// As [`CR4_VMXE`].
const EFER_SVME: u64 = 1 << 12;
/// `CR0.PG`, `CR4.PAE` and `EFER.LMA`: paging is on, of three levels if the last is not set.
const CR0_PG: u64 = 1 << 31;
/// As [`CR0_PG`].
const CR4_PAE: u64 = 1 << 5;
/// As [`CR0_PG`].
const EFER_LMA: u64 = 1 << 10;

impl SpecialRegisters {
    pub(super) fn validate(&self) -> Result<(), String> {
        let segments = [&self.cs, &self.ds, &self.es, &self.fs, &self.gs, &self.ss, &self.tr, &self.ldt];
        if let Some(segment) = segments.iter().find(|segment| segment.type_ > 0xf || segment.dpl > 3) {
            return Err(format!("a segment has type {} and privilege level {}", segment.type_, segment.dpl));
        }
        if self.cr4 & CR4_VMXE != 0 || self.efer & EFER_SVME != 0 {
            return Err("the guest is a hypervisor, which no guest can be here".into());
        }
        let has_pae_paging = self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && self.efer & EFER_LMA == 0;
        if self.pdptrs.is_some() && !has_pae_paging {
            return Err("there are page directory pointers, and no PAE paging".into());
        }
        Ok(())
    }
}

/// `struct kvm_xcr`: an extended control register; 0 is XCR0, the extended state that is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xcr {
    /// Its number.
    pub xcr: u32,
    /// What it holds.
    pub value: u64,
}

/// `struct kvm_debugregs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as in every processor manual")]
pub struct DebugRegisters {
    pub db: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
}
