//! What KVM offers a Linux guest beyond a processor: a clock, the time that was stolen from it, and page faults that it need
//! not wait for. Each is tried on a vCPU, as a guest would switch it on (Linux, Documentation/virt/kvm/x86/msr.rst).

use std::sync::Arc;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{Area, Findings, State};
use crate::arch::x86_64::cpuid::{self, CpuidEntry};
use crate::kvm::{self, Vm};
use crate::ram::GuestRam;

/// Something that a guest switches on by writing MSRs.
struct Offer {
    name: &'static str,
    /// Bits of CPUID 0x4000_0001, eax: all of them.
    features: u32,
    /// `MSR_KVM_*` and what is written there; addresses are in the first page.
    msrs: &'static [(u32, u64)],
    with: &'static str,
    without: &'static str,
}

const OFFERS: [Offer; 3] = [
    Offer {
        name: "kvmclock",
        features: cpuid::KVM_CLOCKSOURCE2,
        msrs: &[(0x4b56_4d01, 1)],
        with: "a Linux guest has a clock that goes on through migrations, and knows the frequency of its TSC",
        without: "a Linux guest measures its clock by a timer, and may be wrong; use a newer kernel",
    },
    Offer {
        name: "steal time",
        features: cpuid::KVM_STEAL_TIME,
        msrs: &[(0x4b56_4d03, 1)],
        with: "a Linux guest sees for how long its vCPUs wanted a CPU and had none",
        without: "a Linux guest takes time in which its vCPUs had no CPU for its own; the host's kernel needs CONFIG_SCHED_INFO",
    },
    Offer {
        name: "async page faults",
        features: cpuid::KVM_ASYNC_PF | cpuid::KVM_ASYNC_PF_INT,
        msrs: &[(0x4b56_4d06, 0xf3), (0x4b56_4d02, 1 | 1 << 3)],
        with: "a Linux guest whose process touches a swapped page runs another one until it is there",
        without: "a vCPU that touches a swapped page does nothing until it is there; a guest with more vCPUs bears it better",
    },
];

pub(super) fn examine(found: &mut Findings, kvm: &Kvm) {
    let Ok(supported) = kvm::supported_cpuid(kvm) else { return };
    let features = supported.iter().find(|entry| entry.function == cpuid::KVM_FEATURES).map_or(0, |entry| entry.eax);
    for offer in OFFERS {
        let (value, state) = match () {
            () if features & offer.features != offer.features => ("not offered", State::Limited),
            () if takes(&supported, offer.msrs) => ("works", State::Ok),
            () => ("offered, but a vCPU refuses it", State::Limited),
        };
        let consequence = if state == State::Ok { offer.with } else { offer.without };
        found.add(Area::Kvm, offer.name, state, value, consequence);
    }
    let deadline = supported.iter().any(|entry| entry.function == 1 && entry.ecx & cpuid::TSC_DEADLINE != 0);
    let (value, consequence) = match deadline {
        true => ("there", "timers of a Linux guest need no calibration"),
        false => ("none", "a Linux guest without a PIT measures its timer, and may be wrong; use a newer kernel"),
    };
    found.add(Area::Kvm, "TSC deadline timer", State::ok_or(deadline, State::Limited), value, consequence);
}

/// Whether a vCPU that is told of all that is supported takes these values.
fn takes(supported: &[CpuidEntry], msrs: &[(u32, u64)]) -> bool {
    let entries: Vec<_> =
        msrs.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    let written = || {
        let vm = Vm::new(Arc::new(GuestRam::new(2 << 20).ok()?)).ok()?;
        let vcpu: VcpuFd = vm.fd().create_vcpu(0).ok()?;
        let told: CpuId = kvm::cpuid_to_kvm(&cpuid::for_vcpu(supported, 0, 1)).ok()?;
        vcpu.set_cpuid2(&told).ok()?;
        vcpu.set_msrs(&Msrs::from_entries(&entries).ok()?).ok()
    };
    written() == Some(entries.len())
}
