//! Why a guest stops by itself.

/// What a device or a vCPU says when the guest ends here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// It switched itself off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// Its kernel has panicked.
    Panic,
    /// A fault while handling a fault while handling a fault.
    TripleFault,
    /// KVM or the host could not go on with it.
    Failed(String),
}
