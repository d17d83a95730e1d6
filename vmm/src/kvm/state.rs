//! What is saved of a VM and its vCPUs: the form that travels, apart from the types that run.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

/// The VM's own devices in the kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    /// The two PICs and the I/O APIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// The programmable interval timer.
    pub pit: kvm_pit_state2,
    /// kvmclock.
    pub clock: kvm_clock_data,
}

/// One vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What CPUID tells this vCPU.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment, control and table registers.
    pub sregs: kvm_sregs,
    /// Extended state, 32-bit words.
    pub xsave: Vec<u32>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Running, halted, waiting for INIT or SIPI.
    pub mp_state: kvm_mp_state,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
    /// Every model-specific register that KVM lists and this vCPU has.
    pub msrs: Vec<kvm_msr_entry>,
    /// Frequency of the time stamp counter, in kHz.
    pub tsc_khz: u32,
    /// Wall-clock time at which the registers were read, nanoseconds since 1970.
    pub saved_at_ns: u64,
}
