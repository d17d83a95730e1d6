//! What the fuzz targets in `vmm/fuzz/` drive: a guest whose every move is made of bytes. A run ends when the bytes do, and leaves
//! nothing behind: its devices' workers are served in the thread that runs it.
#![allow(clippy::unwrap_used, reason = "a run that cannot begin should stop with what it saw")]

mod backends;
mod disk;
mod input;
mod pci;
mod queues;

pub use backends::{net, vsock};
pub use disk::disk;
pub use pci::pci;
pub use queues::{queues, queues_of};

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::devices::virtio::inline;
use crate::ram::GuestRam;

/// Bytes of guest RAM: small, so that whatever an address says is likely to be met.
const RAM: usize = 128 << 10;

thread_local! {
    static GUEST_RAM: Arc<GuestRam> = Arc::new(GuestRam::new(RAM as u64).unwrap());
}

/// RAM of zeros, and no workers.
fn begin() -> Arc<GuestRam> {
    inline::begin();
    let ram = GUEST_RAM.with(Arc::clone);
    ram.memory().write_slice(&[0; RAM], GuestAddress(0)).unwrap();
    ram
}
