//! KVM: the VM, its vCPUs, what they save.

pub mod cpuid;
mod registers;
pub mod state;
mod sys;
mod time;
pub mod vcpu;
pub mod vm;

pub use vcpu::{VcpuExitReason, Vcpus};
pub use vm::Vm;

/// What can go wrong between us and KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("/dev/kvm cannot be opened: {0}; is KVM on (lsmod | grep kvm) and may this user use it?")]
    Open(kvm_ioctls::Error),
    /// An ioctl failed.
    #[error("KVM refused {call}: {source}")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// A model-specific register of the saved state does not exist here or refuses its value.
    #[error("the host's KVM cannot restore MSR {index:#x} to {value:#x}; the hosts differ too much")]
    Msr {
        /// Register number.
        index: u32,
        /// The value it should get.
        value: u64,
    },
    /// An event file descriptor could not be made.
    #[error("eventfd: {0}")]
    EventFd(std::io::Error),
    /// A vCPU thread could not be started.
    #[error("no thread for vCPU {index}: {source}")]
    Thread {
        /// Number of the vCPU.
        index: u8,
        /// What the host said.
        source: std::io::Error,
    },
    /// A vCPU thread has ended, so its state is gone.
    #[error("vCPU {0} has ended")]
    VcpuGone(u8),
    /// The saved state has another number of vCPUs than this machine.
    #[error("the saved state has {saved} vCPUs, this machine {here}")]
    VcpuCount {
        /// In the saved state.
        saved: usize,
        /// In this machine.
        here: usize,
    },
}

impl KvmError {
    pub(crate) fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Call { call, source }
    }
}
