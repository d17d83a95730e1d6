//! A vCPU's registers, read and written: what of the running vCPU becomes the saved one, and back.

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::state::VcpuState;
use super::{KvmError, Vm, cpuid, sys, time};

/// `IA32_TIME_STAMP_COUNTER`, Intel SDM volume 4.
const MSR_TSC: u32 = 0x10;

/// What a vCPU has been told of the processor it is. Kept here because a vCPU that runs cannot be asked, and because
/// `KVM_GET_CPUID2` may give back what the hardware has rather than what was set: KVM without hardware
/// virtualization (PVM) does.
#[derive(Clone, Debug)]
pub(crate) struct Processor {
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of the time stamp counter, kHz.
    pub(crate) tsc_khz: u32,
}

/// Reads everything of a paused vCPU.
pub(super) fn save(vm: &Vm, fd: &VcpuFd, processor: Processor) -> Result<VcpuState, KvmError> {
    // Tells a guest's watchdog that the stop was not its fault; refused for guests without kvmclock, and then useless.
    let _ = fd.kvmclock_ctrl();
    // MP_STATE first: reading it can deliver a pending INIT or SIPI, which changes registers.
    let mp_state = fd.get_mp_state().map_err(KvmError::call("KVM_GET_MP_STATE"))?;
    Ok(VcpuState {
        cpuid: processor.cpuid,
        tsc_khz: processor.tsc_khz,
        mp_state,
        regs: fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?,
        xsave: sys::get_xsave(vm.fd(), fd).map_err(KvmError::call("KVM_GET_XSAVE2"))?,
        xcrs: fd.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?,
        debug_regs: fd.get_debug_regs().map_err(KvmError::call("KVM_GET_DEBUGREGS"))?,
        lapic: fd.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?,
        events: fd.get_vcpu_events().map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?,
        saved_at_ns: time::now_ns(),
        msrs: save_msrs(vm, fd)?,
    })
}

/// Every MSR that KVM lists and this vCPU can read.
fn save_msrs(vm: &Vm, fd: &VcpuFd) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let list = vm.kvm().get_msr_index_list().map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST"))?;
    let wanted: Vec<_> = list.as_slice().iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    // KVM_GET_MSRS stops at the first register it cannot read and says how many it has read.
    while !rest.is_empty() {
        let mut msrs = to_msrs(rest)?;
        let read = fd.get_msrs(&mut msrs).map_err(KvmError::call("KVM_GET_MSRS"))?.min(rest.len());
        saved.extend_from_slice(&msrs.as_slice()[..read]);
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(saved)
}

/// Writes everything of a paused vCPU.
pub(super) fn restore(vm: &Vm, fd: &VcpuFd, state: &VcpuState) -> Result<(), KvmError> {
    // The CPUID first: what other state may be set depends on it. Local APIC before MSRs, for the TSC deadline.
    fd.set_cpuid2(&cpuid::to_kvm(&state.cpuid)?).map_err(KvmError::call("KVM_SET_CPUID2"))?;
    if fd.get_tsc_khz().map_err(KvmError::call("KVM_GET_TSC_KHZ"))? != state.tsc_khz {
        fd.set_tsc_khz(state.tsc_khz).map_err(KvmError::call("KVM_SET_TSC_KHZ"))?;
    }
    fd.set_regs(&state.regs).map_err(KvmError::call("KVM_SET_REGS"))?;
    fd.set_sregs(&state.sregs).map_err(KvmError::call("KVM_SET_SREGS"))?;
    sys::set_xsave(vm.fd(), fd, &state.xsave).map_err(KvmError::call("KVM_SET_XSAVE"))?;
    fd.set_xcrs(&state.xcrs).map_err(KvmError::call("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&state.debug_regs).map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
    fd.set_lapic(&state.lapic).map_err(KvmError::call("KVM_SET_LAPIC"))?;
    restore_msrs(fd, state)?;
    fd.set_vcpu_events(&state.events).map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(state.mp_state).map_err(KvmError::call("KVM_SET_MP_STATE"))
}

fn restore_msrs(fd: &VcpuFd, state: &VcpuState) -> Result<(), KvmError> {
    let now = time::now_ns();
    let mut wanted = state.msrs.clone();
    for entry in wanted.iter_mut().filter(|entry| entry.index == MSR_TSC) {
        entry.data = time::advanced_tsc(entry.data, state.tsc_khz, state.saved_at_ns, now);
    }
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let written = fd.set_msrs(&to_msrs(rest)?).map_err(KvmError::call("KVM_SET_MSRS"))?;
        rest = rest.get(written..).unwrap_or_default();
        // Refused: right if it holds the value anyway.
        let Some(refused) = rest.first() else { break };
        let mut msrs = to_msrs(&[kvm_msr_entry { index: refused.index, ..Default::default() }])?;
        let read = fd.get_msrs(&mut msrs).map_err(KvmError::call("KVM_GET_MSRS"))?;
        if read != 1 || msrs.as_slice()[0].data != refused.data {
            return Err(KvmError::Msr { index: refused.index, value: refused.data });
        }
        rest = &rest[1..];
    }
    Ok(())
}

fn to_msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries)
        .map_err(|_| KvmError::Call { call: "KVM_SET_MSRS", source: kvm_ioctls::Error::new(libc::E2BIG) })
}
