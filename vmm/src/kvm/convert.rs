//! Between the kernel's structures and the types that are saved ([`crate::arch::x86_64::state`]).

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_MP_STATE_AP_RESET_HOLD, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_SREGS2_FLAGS_PDPTRS_VALID,
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use zerocopy::{FromBytes, IntoBytes};

use super::KvmError;
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::arch::x86_64::msrs::Msr;
use crate::arch::x86_64::state::{
    DebugRegisters, DescriptorTable, Events, Exception, GeneralRegisters, Interrupt, IoApic, MpState, Nmi, Pic, Pit,
    PitChannel, Segment, Smi, SpecialRegisters, Xcr,
};
use crate::bounded::Block;

/// Both ways between structures whose fields have the same names: those of the same type, yes or no, and nested ones.
macro_rules! same_names {
    ($ours:ident, $theirs:ident { $($field:ident),* $(; bool $($flag:ident),+)? $(; nested $($nested:ident),+)? }) => {
        impl From<&$theirs> for $ours {
            fn from(from: &$theirs) -> Self {
                Self { $($field: from.$field,)* $($($flag: from.$flag != 0,)+)? $($($nested: (&from.$nested).into(),)+)? }
            }
        }

        impl From<&$ours> for $theirs {
            #[allow(clippy::needless_update, reason = "some have padding")]
            fn from(from: &$ours) -> Self {
                Self {
                    $($field: from.$field,)*
                    $($($flag: from.$flag.into(),)+)?
                    $($($nested: (&from.$nested).into(),)+)?
                    ..Default::default()
                }
            }
        }
    };
}

same_names!(CpuidEntry, kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx });
same_names!(
    GeneralRegisters,
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
);
same_names!(Segment, kvm_segment {
    base, limit, selector, type_, dpl;
    bool present, db, s, l, g, avl, unusable
});
same_names!(DescriptorTable, kvm_dtable { base, limit });
same_names!(DebugRegisters, kvm_debugregs { db, dr6, dr7 });
same_names!(
    Pic,
    kvm_pic_state {
        last_irr,
        irr,
        imr,
        isr,
        priority_add,
        irq_base,
        read_reg_select,
        poll,
        special_mask,
        init_state,
        auto_eoi,
        rotate_on_auto_eoi,
        special_fully_nested_mode,
        init4,
        elcr,
        elcr_mask
    }
);
same_names!(
    PitChannel,
    kvm_pit_channel_state {
        count,
        latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time
    }
);

/// Both ways for `struct kvm_sregs` and `struct kvm_sregs2`, which have these fields in common.
macro_rules! special_registers {
    ($theirs:ident) => {
        impl From<&$theirs> for SpecialRegisters {
            fn from(from: &$theirs) -> Self {
                let &$theirs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = from;
                Self {
                    cs: (&from.cs).into(),
                    ds: (&from.ds).into(),
                    es: (&from.es).into(),
                    fs: (&from.fs).into(),
                    gs: (&from.gs).into(),
                    ss: (&from.ss).into(),
                    tr: (&from.tr).into(),
                    ldt: (&from.ldt).into(),
                    gdt: (&from.gdt).into(),
                    idt: (&from.idt).into(),
                    cr0,
                    cr2,
                    cr3,
                    cr4,
                    cr8,
                    efer,
                    apic_base,
                    pdptrs: None,
                }
            }
        }

        impl From<&SpecialRegisters> for $theirs {
            fn from(from: &SpecialRegisters) -> Self {
                let &SpecialRegisters { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = from;
                Self {
                    cs: (&from.cs).into(),
                    ds: (&from.ds).into(),
                    es: (&from.es).into(),
                    fs: (&from.fs).into(),
                    gs: (&from.gs).into(),
                    ss: (&from.ss).into(),
                    tr: (&from.tr).into(),
                    ldt: (&from.ldt).into(),
                    gdt: (&from.gdt).into(),
                    idt: (&from.idt).into(),
                    cr0,
                    cr2,
                    cr3,
                    cr4,
                    cr8,
                    efer,
                    apic_base,
                    ..Default::default()
                }
            }
        }
    };
}

special_registers!(kvm_sregs);
special_registers!(kvm_sregs2);

/// With the page directory pointers, where the vCPU has some.
pub(super) fn sregs_from_kvm(from: &kvm_sregs2) -> SpecialRegisters {
    let has_pdptrs = from.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    SpecialRegisters { pdptrs: has_pdptrs.then_some(from.pdptrs), ..from.into() }
}

/// As [`sregs_from_kvm`].
pub(super) fn sregs_to_kvm(from: &SpecialRegisters) -> kvm_sregs2 {
    let flags = if from.pdptrs.is_some() { KVM_SREGS2_FLAGS_PDPTRS_VALID.into() } else { 0 };
    kvm_sregs2 { flags, pdptrs: from.pdptrs.unwrap_or_default(), ..from.into() }
}

impl From<&kvm_msr_entry> for Msr {
    fn from(from: &kvm_msr_entry) -> Self {
        Self { index: from.index, value: from.data }
    }
}

impl From<&Msr> for kvm_msr_entry {
    fn from(from: &Msr) -> Self {
        Self { index: from.index, data: from.value, ..Default::default() }
    }
}

impl TryFrom<kvm_mp_state> for MpState {
    type Error = KvmError;

    fn try_from(from: kvm_mp_state) -> Result<Self, KvmError> {
        Ok(match from.mp_state {
            KVM_MP_STATE_RUNNABLE => Self::Runnable,
            KVM_MP_STATE_UNINITIALIZED => Self::Uninitialized,
            KVM_MP_STATE_INIT_RECEIVED => Self::InitReceived,
            KVM_MP_STATE_HALTED => Self::Halted,
            KVM_MP_STATE_SIPI_RECEIVED => Self::SipiReceived,
            KVM_MP_STATE_AP_RESET_HOLD => Self::ApResetHold,
            other => return Err(KvmError::MpState(other)),
        })
    }
}

impl From<MpState> for kvm_mp_state {
    fn from(from: MpState) -> Self {
        let mp_state = match from {
            MpState::Runnable => KVM_MP_STATE_RUNNABLE,
            MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
            MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
            MpState::Halted => KVM_MP_STATE_HALTED,
            MpState::SipiReceived => KVM_MP_STATE_SIPI_RECEIVED,
            MpState::ApResetHold => KVM_MP_STATE_AP_RESET_HOLD,
        };
        Self { mp_state }
    }
}

impl From<&kvm_vcpu_events> for Events {
    fn from(from: &kvm_vcpu_events) -> Self {
        Self {
            exception: Exception {
                injected: from.exception.injected != 0,
                nr: from.exception.nr,
                has_error_code: from.exception.has_error_code != 0,
                pending: from.exception.pending != 0,
                error_code: from.exception.error_code,
                payload: (from.exception_has_payload != 0).then_some(from.exception_payload),
            },
            interrupt: Interrupt {
                injected: from.interrupt.injected != 0,
                nr: from.interrupt.nr,
                soft: from.interrupt.soft != 0,
                shadow: from.interrupt.shadow,
            },
            nmi: Nmi { injected: from.nmi.injected != 0, pending: from.nmi.pending, masked: from.nmi.masked != 0 },
            sipi_vector: from.sipi_vector,
            flags: from.flags,
            smi: Smi {
                smm: from.smi.smm != 0,
                pending: from.smi.pending != 0,
                smm_inside_nmi: from.smi.smm_inside_nmi != 0,
                latched_init: from.smi.latched_init != 0,
            },
            triple_fault_pending: from.triple_fault.pending != 0,
        }
    }
}

impl From<&Events> for kvm_vcpu_events {
    fn from(from: &Events) -> Self {
        let mut to = Self { sipi_vector: from.sipi_vector, flags: from.flags, ..Default::default() };
        to.exception.injected = from.exception.injected.into();
        to.exception.nr = from.exception.nr;
        to.exception.has_error_code = from.exception.has_error_code.into();
        to.exception.pending = from.exception.pending.into();
        to.exception.error_code = from.exception.error_code;
        to.exception_has_payload = from.exception.payload.is_some().into();
        to.exception_payload = from.exception.payload.unwrap_or_default();
        to.interrupt.injected = from.interrupt.injected.into();
        to.interrupt.nr = from.interrupt.nr;
        to.interrupt.soft = from.interrupt.soft.into();
        to.interrupt.shadow = from.interrupt.shadow;
        to.nmi.injected = from.nmi.injected.into();
        to.nmi.pending = from.nmi.pending;
        to.nmi.masked = from.nmi.masked.into();
        to.smi.smm = from.smi.smm.into();
        to.smi.pending = from.smi.pending.into();
        to.smi.smm_inside_nmi = from.smi.smm_inside_nmi.into();
        to.smi.latched_init = from.smi.latched_init.into();
        to.triple_fault.pending = from.triple_fault_pending.into();
        to
    }
}

impl From<&kvm_pit_state2> for Pit {
    fn from(from: &kvm_pit_state2) -> Self {
        Self { channels: from.channels.each_ref().map(Into::into), flags: from.flags }
    }
}

impl From<&Pit> for kvm_pit_state2 {
    fn from(from: &Pit) -> Self {
        Self { channels: from.channels.each_ref().map(Into::into), flags: from.flags, ..Default::default() }
    }
}

pub(super) fn xcrs_from_kvm(from: &kvm_xcrs) -> Vec<Xcr> {
    let xcrs = from.xcrs.iter().take(from.nr_xcrs as usize);
    xcrs.map(|xcr| Xcr { xcr: xcr.xcr, value: xcr.value }).collect()
}

/// As many as the kernel's structure has room for; the type that is saved has no more.
pub(super) fn xcrs_to_kvm(from: &[Xcr]) -> kvm_xcrs {
    let mut to = kvm_xcrs::default();
    for (to, from) in to.xcrs.iter_mut().zip(from) {
        *to = kvm_xcr { xcr: from.xcr, value: from.value, ..Default::default() };
    }
    to.nr_xcrs = from.len().min(to.xcrs.len()) as u32;
    to
}

pub(super) fn lapic_from_kvm(from: &kvm_lapic_state) -> Block<1024> {
    Block(Box::new(from.regs.map(|byte| byte as u8)))
}

pub(super) fn lapic_to_kvm(from: &Block<1024>) -> kvm_lapic_state {
    kvm_lapic_state { regs: from.0.map(|byte| byte as std::os::raw::c_char) }
}

/// `struct kvm_irqchip`: number, padding, and the largest of its chips.
const CHIP_OFFSET: usize = 8;

/// `struct kvm_ioapic_state` with its redirection table as numbers, whose other form is a union.
#[derive(FromBytes, IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct KernelIoApic {
    base_address: u64,
    ioregsel: u32,
    id: u32,
    irr: u32,
    pad: u32,
    redirtbl: [u64; 24],
}

/// The chip in a structure that KVM has filled; `None` if it were shorter.
pub(super) fn pic_from_kvm(from: &kvm_irqchip) -> Option<Pic> {
    let chip = from.as_bytes().get(CHIP_OFFSET..)?;
    kvm_pic_state::read_from_prefix(chip).ok().map(|(pic, _)| (&pic).into())
}

/// As [`pic_from_kvm`].
pub(super) fn io_apic_from_kvm(from: &kvm_irqchip) -> Option<IoApic> {
    let chip = from.as_bytes().get(CHIP_OFFSET..)?;
    let (chip, _) = KernelIoApic::read_from_prefix(chip).ok()?;
    let KernelIoApic { base_address, ioregsel, id, irr, redirtbl, .. } = chip;
    Some(IoApic { base_address, ioregsel, id, irr, redirtbl })
}

pub(super) fn pic_to_kvm(chip_id: u32, from: &Pic) -> kvm_irqchip {
    let mut to = kvm_irqchip { chip_id, ..Default::default() };
    to.chip.pic = from.into();
    to
}

pub(super) fn io_apic_to_kvm(from: &IoApic) -> kvm_irqchip {
    let mut to = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    let &IoApic { base_address, ioregsel, id, irr, redirtbl } = from;
    let chip = KernelIoApic { base_address, ioregsel, id, irr, pad: 0, redirtbl };
    let mut bytes = [0; 512];
    for (to, from) in bytes.iter_mut().zip(chip.as_bytes()) {
        *to = *from as std::os::raw::c_char;
    }
    to.chip.dummy = bytes;
    to
}

/// The entries as KVM wants them.
pub(crate) fn cpuid_to_kvm(entries: &[CpuidEntry]) -> Result<CpuId, KvmError> {
    let entries: Vec<kvm_cpuid_entry2> = entries.iter().map(Into::into).collect();
    CpuId::from_entries(&entries)
        .map_err(|_| KvmError::Call { call: "KVM_SET_CPUID2", cause: kvm_ioctls::Error::new(libc::E2BIG) })
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_IRQCHIP_PIC_SLAVE;

    use super::*;

    #[test]
    fn interrupt_controllers_survive_both_ways() {
        let pic = Pic { irr: 1, imr: 2, elcr: 3, elcr_mask: 4, ..Pic::default() };
        assert_eq!(pic_from_kvm(&pic_to_kvm(KVM_IRQCHIP_PIC_SLAVE, &pic)), Some(pic));
        let mut io_apic = IoApic { base_address: 0xfec0_0000, ioregsel: 1, id: 2, irr: 3, redirtbl: [0; 24] };
        io_apic.redirtbl[23] = 0x0123_4567_89ab_cdef;
        let kernel = io_apic_to_kvm(&io_apic);
        assert_eq!(kernel.chip_id, KVM_IRQCHIP_IOAPIC);
        assert_eq!(io_apic_from_kvm(&kernel), Some(io_apic));
    }

    #[test]
    fn special_registers_survive_both_ways() {
        let segment = Segment { base: 1, limit: 2, selector: 3, type_: 4, dpl: 1, l: true, ..Segment::default() };
        let table = DescriptorTable { base: 5, limit: 6 };
        let registers = SpecialRegisters {
            cs: segment.clone(),
            ldt: segment,
            idt: table,
            cr3: 7,
            cr8: 8,
            efer: 9,
            apic_base: 10,
            pdptrs: Some([11, 12, 13, 14]),
            ..SpecialRegisters::default()
        };
        assert_eq!(sregs_from_kvm(&sregs_to_kvm(&registers)), registers);
        let without = SpecialRegisters { pdptrs: None, ..registers };
        assert_eq!(sregs_from_kvm(&sregs_to_kvm(&without)), without);
        assert_eq!(SpecialRegisters::from(&kvm_sregs::from(&without)), without);
    }

    #[test]
    fn events_survive_both_ways() {
        let events = Events {
            exception: Exception { nr: 14, pending: true, payload: Some(7), ..Exception::default() },
            interrupt: Interrupt { injected: true, nr: 32, soft: false, shadow: 1 },
            nmi: Nmi { pending: 2, ..Nmi::default() },
            sipi_vector: 9,
            flags: 5,
            smi: Smi { latched_init: true, ..Smi::default() },
            triple_fault_pending: true,
        };
        assert_eq!(Events::from(&kvm_vcpu_events::from(&events)), events);
    }

    #[test]
    fn what_a_vcpu_does_is_told_apart() {
        for number in 0..16 {
            let state = kvm_mp_state { mp_state: number };
            match MpState::try_from(state) {
                Ok(ours) => assert_eq!(kvm_mp_state::from(ours), state),
                Err(e) => assert!(e.to_string().contains(&number.to_string()), "{e}"),
            }
        }
    }
}
