//! Virtio devices (Virtual I/O Device specification 1.2).
//!
//! | to read about | open |
//! |---|---|
//! | what every virtio device is | `device.rs` |
//! | a virtqueue, and when the driver is notified | `queue.rs` |
//! | a descriptor chain, checked before anybody uses it | `chain.rs` |
//! | the thread that serves queues | `worker.rs` |
//!
//! A device trusts nothing in the guest's memory. What a chain says is checked once, by [`Chain`]; what it means, by the device.

mod chain;
mod device;
mod queue;
#[cfg(test)]
pub(crate) mod testing;
mod worker;

pub use chain::{Buffers, Chain, RamSlice};
pub use device::{Activation, DeviceFault, Notify, VirtioDevice};
pub use queue::{QueueLock, Virtqueue};
pub use worker::{Events, Handler, Worker};
