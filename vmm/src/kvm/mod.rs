//! KVM: the VM, its vCPUs, what they save.

mod convert;
mod irq;
mod registers;
mod sys;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod time;
pub mod vcpu;
pub mod vm;

pub(crate) use convert::cpuid_to_kvm;
pub use registers::features;
pub use vcpu::{Told, Vcpus};
pub use vm::Vm;

use std::time::Duration;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};
use memory_agent::ByteSize;

use crate::arch::x86_64::cpuid::{self, CpuModel, CpuidEntry, ModelError};
use crate::arch::x86_64::msrs::MsrError;
use crate::ram::RamLayout;

/// What can go wrong between us and KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("/dev/kvm cannot be opened: {0}; is KVM on (lsmod | grep kvm) and may this user use it?")]
    Open(kvm_ioctls::Error),
    /// An ioctl failed.
    #[error("KVM refused {call}: {cause}")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// What KVM said.
        cause: kvm_ioctls::Error,
    },
    /// A model-specific register of the saved state does not exist here or refuses its value.
    #[error("the host's KVM cannot restore MSR {index:#x} to {value:#x}; the hosts differ too much")]
    Msr {
        /// Register number.
        index: u32,
        /// The value it should get.
        value: u64,
    },
    /// A model-specific register that every vCPU has is not there.
    #[error("the host's KVM has no MSR {0:#x}; use a newer kernel")]
    NoMsr(u32),
    /// Model-specific registers that this host does not take.
    #[error(transparent)]
    Msrs(#[from] MsrError),
    /// The saved state has more extended state than this host's processor.
    #[error("the saved state has extended processor state behind byte {0}, where this host's ends")]
    ExtendedState(usize),
    /// A vCPU does something that has no meaning on this processor.
    #[error("KVM says that a vCPU is in state {0}, which no x86 vCPU can be in")]
    MpState(u32),
    /// The host cannot run the guest's time stamp counter.
    #[error(
        "the guest's time stamp counter runs at {guest} kHz and this host's at {host} kHz, which its KVM cannot scale"
    )]
    TscFrequency {
        /// What the guest was told.
        guest: u32,
        /// What this host has.
        host: u32,
    },
    /// This host cannot be the processor that was asked for.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An event file descriptor could not be made.
    #[error("eventfd: {0}")]
    EventFd(std::io::Error),
    /// A vCPU thread could not be started.
    #[error("no thread for vCPU {index}: {cause}")]
    Thread {
        /// Number of the vCPU.
        index: u8,
        /// What the host said.
        cause: std::io::Error,
    },
    /// A vCPU runs on.
    #[error("vCPU {index} has not stopped within {limit:?}: it waits in the kernel, perhaps for memory; try again")]
    RunsOn {
        /// Number of the vCPU.
        index: u8,
        /// How long it had.
        limit: Duration,
    },
    /// A vCPU thread has ended, so its state is gone.
    #[error("vCPU {0} has ended")]
    VcpuGone(u8),
}

/// What this host tells a guest of its processor: what its KVM can, but for what [`cpuid::offered`] leaves out.
///
/// # Errors
/// When KVM refuses.
pub fn supported_cpuid(kvm: &Kvm) -> Result<Vec<CpuidEntry>, KvmError> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
    let mut entries: Vec<CpuidEntry> = cpuid.as_slice().iter().map(Into::into).collect();
    // Left out of the answer, as they depend on user space (Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID): that
    // there is a hypervisor, without which a guest looks for no kvmclock; and the local APIC's deadline timer.
    let deadline = if kvm.check_extension(Cap::TscDeadlineTimer) { cpuid::TSC_DEADLINE } else { 0 };
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= cpuid::HYPERVISOR | deadline;
    }
    Ok(cpuid::offered(&entries))
}

/// What a new guest with this memory is told of its processor, of a model.
///
/// # Errors
/// When this host cannot be it, or KVM refuses.
fn model_cpuid(kvm: &Kvm, model: CpuModel, ram: &RamLayout) -> Result<Vec<CpuidEntry>, KvmError> {
    let end = ram.regions().iter().map(|region| region.start.saturating_add(region.length)).max();
    let address_bits = end.map_or(0, |end| u64::BITS - end.saturating_sub(1).leading_zeros());
    Ok(model.of(&supported_cpuid(kvm)?, address_bits)?)
}

/// Whether a machine of this model with this much memory can be made here.
///
/// # Errors
/// When it cannot, or KVM does not say.
pub fn check_model(model: CpuModel, memory: ByteSize) -> Result<(), KvmError> {
    if model == CpuModel::Host {
        return Ok(());
    }
    let kvm = Kvm::new().map_err(KvmError::Open)?;
    model_cpuid(&kvm, model, &RamLayout::new(memory.bytes())).map(drop)
}

impl KvmError {
    pub(crate) fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |cause| Self::Call { call, cause }
    }
}
