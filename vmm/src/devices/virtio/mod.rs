//! Virtio devices (Virtual I/O Device specification 1.2).
//!
//! | to read about | open |
//! |---|---|
//! | what every virtio device is | `device.rs` |
//! | a virtqueue, and when the driver is notified | `queue.rs` |
//! | a descriptor chain, checked before anybody uses it | `chain.rs` |
//! | a thread that serves queues, and all of a device's | `worker.rs`, `workers.rs` |
//! | the transport: virtio over PCI | `pci/` |
//! | randomness, the smallest device | `rng.rs` |
//! | memory that the guest gives back | `balloon/` |
//! | `hvc0` | `console/` |
//! | disks | `block/` |
//! | network interfaces | `net/` |
//! | sockets to the host | `vsock/` |
//!
//! A device trusts nothing in the guest's memory. What a chain says is checked once, by [`Chain`]; what it means, by the device.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod device;
#[cfg(feature = "fuzzing")]
pub(crate) mod inline;
pub mod net;
pub mod pci;
mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
mod worker;
mod workers;

pub use chain::{Buffers, Chain, RamSlice};
pub use device::{Activation, DeviceFault, Notify, VirtioDevice};
pub use queue::{QueueLock, QueueSetup, Virtqueue};
pub use worker::{Events, Handler, Worker};
pub use workers::Workers;

/// Fills `data` from a configuration space at `offset`; with zeros behind its end.
pub(crate) fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
}
