//! A vCPU's registers, read and written: what of the running vCPU becomes the saved one, and back.

use std::collections::BTreeSet;

use kvm_bindings::{Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::VcpuFd;

use super::{KvmError, Vm, convert, sys, time};
use crate::arch::x86_64::msrs::{self, Msr};
use crate::arch::x86_64::state::VcpuState;

/// Reads everything of a paused vCPU.
pub(super) fn save(vm: &Vm, fd: &VcpuFd) -> Result<VcpuState, KvmError> {
    // Tells a guest's watchdog that the stop was not its fault; refused for guests without kvmclock, and then useless.
    let _ = fd.kvmclock_ctrl();
    // MP_STATE first: reading it can deliver a pending INIT or SIPI, which changes registers.
    let mp_state = fd.get_mp_state().map_err(KvmError::call("KVM_GET_MP_STATE"))?;
    Ok(VcpuState {
        mp_state: mp_state.try_into()?,
        regs: (&fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?).into(),
        sregs: (&fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?).into(),
        xsave: sys::get_xsave(vm.fd(), fd).map_err(KvmError::call("KVM_GET_XSAVE2"))?,
        xcrs: convert::xcrs_from_kvm(&fd.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?),
        debug_regs: (&fd.get_debug_regs().map_err(KvmError::call("KVM_GET_DEBUGREGS"))?).into(),
        lapic: convert::lapic_from_kvm(&fd.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?),
        events: (&fd.get_vcpu_events().map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?).into(),
        saved_at_ns: time::now_ns(),
        msrs: save_msrs(vm, fd)?,
    })
}

/// The MSRs that KVM lists here.
fn listed(vm: &Vm) -> Result<Vec<u32>, KvmError> {
    let list = vm.kvm().get_msr_index_list().map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

/// Every MSR that KVM lists, a guest can have, and this vCPU can read.
fn save_msrs(vm: &Vm, fd: &VcpuFd) -> Result<Vec<Msr>, KvmError> {
    let taken = listed(vm)?.into_iter().filter(|&index| msrs::is_taken(index));
    let wanted: Vec<_> = taken.map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    // KVM_GET_MSRS stops at the first register it cannot read and says how many it has read.
    while !rest.is_empty() {
        let mut msrs = to_msrs(rest)?;
        let read = fd.get_msrs(&mut msrs).map_err(KvmError::call("KVM_GET_MSRS"))?.min(rest.len());
        saved.extend(msrs.as_slice()[..read].iter().map(Msr::from));
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(saved)
}

/// The sets of features that this host has.
fn features(vm: &Vm) -> Result<Vec<Msr>, KvmError> {
    let mut here = Vec::new();
    for index in msrs::FEATURES {
        let mut msr = to_msrs(&[kvm_msr_entry { index, ..Default::default() }])?;
        // Refused by a host that does not have the register, or whose KVM does not offer it.
        if vm.kvm().get_msrs(&mut msr) == Ok(1) {
            here.extend(msr.as_slice().iter().map(Msr::from));
        }
    }
    Ok(here)
}

/// Writes everything of a paused vCPU, which has been told of its processor already: what other state may be set depends
/// on that. `tsc_khz` is what it was told.
pub(super) fn restore(vm: &Vm, fd: &VcpuFd, state: &VcpuState, tsc_khz: u32) -> Result<(), KvmError> {
    let listed: BTreeSet<_> = listed(vm)?.into_iter().collect();
    let msrs = msrs::take(&state.msrs, &listed, &features(vm)?)?;
    let words = sys::xsave_words(vm.fd());
    if state.xsave.iter().skip(words).any(|word| *word != 0) {
        return Err(KvmError::ExtendedState(words * 4));
    }
    fd.set_regs(&kvm_regs::from(&state.regs)).map_err(KvmError::call("KVM_SET_REGS"))?;
    fd.set_sregs(&kvm_sregs::from(&state.sregs)).map_err(KvmError::call("KVM_SET_SREGS"))?;
    sys::set_xsave(vm.fd(), fd, &state.xsave).map_err(KvmError::call("KVM_SET_XSAVE"))?;
    fd.set_xcrs(&convert::xcrs_to_kvm(&state.xcrs)).map_err(KvmError::call("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&kvm_debugregs::from(&state.debug_regs)).map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
    // Local APIC before MSRs, for the TSC deadline.
    fd.set_lapic(&convert::lapic_to_kvm(&state.lapic)).map_err(KvmError::call("KVM_SET_LAPIC"))?;
    let now = time::now_ns();
    let advanced = msrs.written.iter().map(|msr| match msr.index {
        msrs::TSC => Msr { value: time::advanced_tsc(msr.value, tsc_khz, state.saved_at_ns, now), ..*msr },
        _ => *msr,
    });
    write_msrs(fd, &advanced.map(|msr| (&msr).into()).collect::<Vec<_>>())?;
    for msr in &msrs.compared {
        must_hold(fd, *msr)?;
    }
    fd.set_vcpu_events(&kvm_vcpu_events::from(&state.events)).map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(state.mp_state.into()).map_err(KvmError::call("KVM_SET_MP_STATE"))
}

fn write_msrs(fd: &VcpuFd, wanted: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = wanted;
    while !rest.is_empty() {
        let written = fd.set_msrs(&to_msrs(rest)?).map_err(KvmError::call("KVM_SET_MSRS"))?;
        rest = rest.get(written..).unwrap_or_default();
        // Refused: right if it holds the value anyway.
        let Some((refused, behind)) = rest.split_first() else { break };
        must_hold(fd, refused.into())?;
        rest = behind;
    }
    Ok(())
}

fn must_hold(fd: &VcpuFd, msr: Msr) -> Result<(), KvmError> {
    let mut here = to_msrs(&[kvm_msr_entry { index: msr.index, ..Default::default() }])?;
    let read = fd.get_msrs(&mut here).map_err(KvmError::call("KVM_GET_MSRS"))?;
    match here.as_slice() {
        [entry] if read == 1 && entry.data == msr.value => Ok(()),
        _ => Err(KvmError::Msr { index: msr.index, value: msr.value }),
    }
}

fn to_msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries)
        .map_err(|_| KvmError::Call { call: "KVM_SET_MSRS", cause: kvm_ioctls::Error::new(libc::E2BIG) })
}
