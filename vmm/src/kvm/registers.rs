//! A vCPU's registers, read and written: what of the running vCPU becomes the saved one, and back.

use std::collections::BTreeSet;

use kvm_bindings::{Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{KvmError, Vm, convert, sys};
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::arch::x86_64::msrs::{self, Msr};
use crate::arch::x86_64::state::{SpecialRegisters, VcpuState};

/// Most MSRs that are read or written in one call: half of what KVM takes (arch/x86/kvm/x86.c, `MAX_IO_MSRS`).
const MSRS_A_CALL: usize = 128;

/// Reads everything of a paused vCPU but its time stamp counter.
pub(super) fn save(vm: &Vm, fd: &VcpuFd) -> Result<VcpuState, KvmError> {
    // MP_STATE first: reading it can deliver a pending INIT or SIPI, which changes registers.
    let mp_state = fd.get_mp_state().map_err(KvmError::call("KVM_GET_MP_STATE"))?;
    Ok(VcpuState {
        mp_state: mp_state.try_into()?,
        regs: (&fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?).into(),
        sregs: special_registers(vm, fd)?,
        xsave: sys::get_xsave(vm.fd(), fd).map_err(KvmError::call("KVM_GET_XSAVE2"))?,
        xcrs: convert::xcrs_from_kvm(&fd.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?),
        debug_regs: (&fd.get_debug_regs().map_err(KvmError::call("KVM_GET_DEBUGREGS"))?).into(),
        lapic: convert::lapic_from_kvm(&fd.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?),
        events: (&fd.get_vcpu_events().map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?).into(),
        msrs: read_msrs(fd, &msrs::saved(&listed(vm)?))?,
    })
}

/// Whether KVM has the page directory pointers apart from memory (`KVM_CAP_SREGS2`, Linux 5.14).
fn has_pdptrs(vm: &Vm) -> bool {
    vm.kvm().check_extension_raw(kvm_bindings::KVM_CAP_SREGS2.into()) > 0
}

fn special_registers(vm: &Vm, fd: &VcpuFd) -> Result<SpecialRegisters, KvmError> {
    if has_pdptrs(vm) {
        let sregs = sys::get_sregs2(fd).map_err(KvmError::call("KVM_GET_SREGS2"))?;
        return Ok(convert::sregs_from_kvm(&sregs));
    }
    Ok((&fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?).into())
}

fn set_special_registers(vm: &Vm, fd: &VcpuFd, sregs: &SpecialRegisters) -> Result<(), KvmError> {
    if has_pdptrs(vm) {
        return sys::set_sregs2(fd, &convert::sregs_to_kvm(sregs)).map_err(KvmError::call("KVM_SET_SREGS2"));
    }
    // KVM reads the page directory pointers from memory, where a guest may have changed them since it loaded CR3.
    fd.set_sregs(&kvm_sregs::from(sregs)).map_err(KvmError::call("KVM_SET_SREGS"))
}

/// The MSRs that KVM lists here.
fn listed(vm: &Vm) -> Result<Vec<u32>, KvmError> {
    let list = vm.kvm().get_msr_index_list().map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

/// Those of these MSRs that a vCPU has.
fn read_msrs(fd: &VcpuFd, wanted: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    // KVM_GET_MSRS stops at the first register it cannot read and says how many it has read.
    while !rest.is_empty() {
        let asked = &rest[..rest.len().min(MSRS_A_CALL)];
        let entries: Vec<_> = asked.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = to_msrs(&entries)?;
        let read = fd.get_msrs(&mut msrs).map_err(KvmError::call("KVM_GET_MSRS"))?.min(asked.len());
        saved.extend(msrs.as_slice()[..read].iter().map(Msr::from));
        let refused = usize::from(read < asked.len());
        rest = &rest[read + refused..];
    }
    Ok(saved)
}

/// One MSR, which every vCPU has.
pub(super) fn read_msr(fd: &VcpuFd, index: u32) -> Result<u64, KvmError> {
    match read_msrs(fd, &[index])?[..] {
        [msr] => Ok(msr.value),
        _ => Err(KvmError::NoMsr(index)),
    }
}

/// What this host's KVM can tell a guest of features in MSRs: [`msrs::FEATURES`].
///
/// # Errors
/// When KVM refuses.
pub fn features(kvm: &Kvm) -> Result<Vec<Msr>, KvmError> {
    let mut here = Vec::new();
    for index in msrs::FEATURES {
        let mut msr = to_msrs(&[kvm_msr_entry { index, ..Default::default() }])?;
        // Refused by a host that does not have the register, or whose KVM does not offer it.
        if kvm.get_msrs(&mut msr) == Ok(1) {
            here.extend(msr.as_slice().iter().map(Msr::from));
        }
    }
    Ok(here)
}

/// The features in MSRs of a new guest, which is told of this CPUID: those of this host that it can be told of.
pub(super) fn new_features(vm: &Vm, cpuid: &[CpuidEntry]) -> Result<Vec<Msr>, KvmError> {
    let mut features = features(vm.kvm())?;
    features.retain(|msr| msrs::has_feature(msr.index, cpuid));
    Ok(features)
}

/// Offers a new guest's first vCPU these features in MSRs; gives what it has of them then, as a KVM that does not take a value leaves its
/// own there.
pub(super) fn offer_features(fd: &VcpuFd, features: &[Msr]) -> Result<Vec<Msr>, KvmError> {
    for msr in features {
        fd.set_msrs(&to_msrs(&[msr.into()])?).map_err(KvmError::call("KVM_SET_MSRS"))?;
    }
    read_msrs(fd, &features.iter().map(|msr| msr.index).collect::<Vec<_>>())
}

/// Writes everything of a paused vCPU but its time stamp counter, which is right already: deadlines are of its time. It has been told of
/// its processor, too: what other state may be set depends on that.
pub(super) fn restore(vm: &Vm, fd: &VcpuFd, state: &VcpuState) -> Result<(), KvmError> {
    let listed: BTreeSet<_> = listed(vm)?.into_iter().collect();
    let msrs = msrs::take(&state.msrs, &listed)?;
    let words = sys::xsave_words(vm.fd());
    if state.xsave.iter().skip(words).any(|word| *word != 0) {
        return Err(KvmError::ExtendedState(words * 4));
    }
    fd.set_regs(&kvm_regs::from(&state.regs)).map_err(KvmError::call("KVM_SET_REGS"))?;
    set_special_registers(vm, fd, &state.sregs)?;
    sys::set_xsave(vm.fd(), fd, &state.xsave).map_err(KvmError::call("KVM_SET_XSAVE"))?;
    fd.set_xcrs(&convert::xcrs_to_kvm(&state.xcrs)).map_err(KvmError::call("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&kvm_debugregs::from(&state.debug_regs)).map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
    // Local APIC before MSRs, for the TSC deadline. Among MSRs is that of asynchronous page faults: when it is written, KVM wakes all tasks
    // of the guest that wait for a page, as whoever was to tell them stayed at the source (arch/x86/kvm/x86.c, `kvm_pv_enable_async_pf`).
    fd.set_lapic(&convert::lapic_to_kvm(&state.lapic)).map_err(KvmError::call("KVM_SET_LAPIC"))?;
    write_msrs(fd, &msrs.written)?;
    msrs.compared.iter().try_for_each(|msr| must_hold(fd, *msr))?;
    fd.set_vcpu_events(&kvm_vcpu_events::from(&state.events)).map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(state.mp_state.into()).map_err(KvmError::call("KVM_SET_MP_STATE"))
}

/// Writes MSRs. One that is refused is right if it holds the value anyway.
pub(super) fn write_msrs(fd: &VcpuFd, wanted: &[Msr]) -> Result<(), KvmError> {
    let mut rest = wanted;
    while !rest.is_empty() {
        let asked = &rest[..rest.len().min(MSRS_A_CALL)];
        let entries: Vec<_> = asked.iter().map(kvm_msr_entry::from).collect();
        let written = fd.set_msrs(&to_msrs(&entries)?).map_err(KvmError::call("KVM_SET_MSRS"))?.min(asked.len());
        let refused = asked.get(written);
        refused.map_or(Ok(()), |msr| must_hold(fd, *msr))?;
        rest = &rest[written + usize::from(refused.is_some())..];
    }
    Ok(())
}

fn must_hold(fd: &VcpuFd, msr: Msr) -> Result<(), KvmError> {
    if read_msrs(fd, &[msr.index])? == [msr] {
        return Ok(());
    }
    Err(KvmError::Msr { index: msr.index, value: msr.value })
}

fn to_msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries)
        .map_err(|_| KvmError::Call { call: "KVM_SET_MSRS", cause: kvm_ioctls::Error::new(libc::E2BIG) })
}
