//! Virtio over PCI, the interface of version 1 alone (VIRTIO 1.2, 4.1): one function with one BAR, interrupts by MSI-X.
//!
//! | to read about | open |
//! |---|---|
//! | where registers lie, and the capabilities that say so | `layout.rs` |
//! | what a driver selects, accepts and sets up | `common.rs` |
//! | status and vectors, which workers change too | `shared.rs` |
//! | activation and reset | `transport.rs` |
//! | the device as the machine and the bus see it | `function.rs` |
//!
//! No register waits for a worker: what a driver has set up is copied to the queues when it says `DRIVER_OK`, and a reset is told
//! to the workers, and done once they have ended. Until then, the status is not 0, and nothing else can be written.

mod common;
mod function;
mod layout;
mod shared;
#[cfg(test)]
mod tests;
mod transport;

pub use common::CommonConfig;
pub(in crate::devices) use function::make;
pub use transport::SavedVirtio;
