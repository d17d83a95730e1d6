//! Sockets between programs of the guest and of the host (VIRTIO 1.2, 5.10), which are Unix sockets on this side.
//!
//! | to read about | open |
//! |---|---|
//! | a packet's header | `packet.rs` |
//! | one connection and its credit | `connection.rs` |
//! | the host's side, and what its programs say first | `socket.rs` |
//! | how a user asks for it | `options.rs` |
//! | the thread that serves all | `serve.rs` |
//!
//! The guest is not trusted: what it sends is bounded a connection (`BUFFER`), connections and what it is still to be told are bounded in
//! number, and whatever makes no sense ends the connection that it is about.

mod connection;
mod options;
mod packet;
mod serve;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

pub use options::{VsockError, VsockOptions};
pub use socket::VsockSocket;

use super::{Activation, DeviceFault, VirtioDevice, Worker, Workers};
use crate::devices::host::Host;
use crate::devices::{DeviceDescription, DeviceError};
use serve::Serving;

/// What it is called in the table of devices.
pub const KIND: &str = "virtio-vsock";
/// Its type.
const TYPE: u32 = 19;
/// Receive, transmit, events.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// Context ids of guests; those below are of the hypervisor, of this machine itself and of the host (`VMADDR_CID_HOST`).
const CIDS: std::ops::Range<u32> = 3..u32::MAX;

/// What the guest sees of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's context id.
    pub cid: u32,
}

/// What is saved. Connections are not: their other ends are programs of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedVsock {}

/// A socket device.
#[derive(Debug)]
pub struct VirtioVsock {
    description: DeviceDescription,
    config: VsockConfig,
    socket: Arc<VsockSocket>,
    is_reset_due: Arc<AtomicBool>,
    workers: Workers,
}

impl VirtioVsock {
    /// A device of this description whose programs on the host come to `socket`.
    ///
    /// # Errors
    /// When no guest can have that context id.
    pub fn new(description: &DeviceDescription, socket: Arc<VsockSocket>) -> Result<Self, DeviceError> {
        let config: VsockConfig = description.config()?;
        if !CIDS.contains(&config.cid) {
            let (id, kind) = (description.id.clone(), description.kind.clone());
            return Err(DeviceError::Config { id, kind, why: format!("no guest has the context id {}", config.cid) });
        }
        let description = description.clone();
        Ok(Self { description, config, socket, is_reset_due: Arc::default(), workers: Workers::default() })
    }
}

/// The device of this description.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    host: &mut Host,
) -> Result<Arc<dyn VirtioDevice>, DeviceError> {
    let id = &description.id;
    let none = || {
        let why = "the guest has sockets, and no place is given for them here; say --vsock cid=…,socket=PATH";
        DeviceError::Host { id: id.clone(), cause: io::Error::other(why) }
    };
    let socket = host.backends.vsocks.get(id).ok_or_else(none)?;
    Ok(Arc::new(VirtioVsock::new(description, Arc::clone(socket))?))
}

impl VirtioDevice for VirtioVsock {
    fn device_type(&self) -> u32 {
        TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&u64::from(self.config.cid).to_le_bytes(), offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceFault> {
        let serving = Serving::new(&activation, self.config.cid.into(), &self.socket, &self.is_reset_due);
        self.workers.set([Worker::new(self.description.id.as_str(), &activation, &activation.queues, serving)?]);
        Ok(())
    }

    fn workers(&self) -> &Workers {
        &self.workers
    }

    fn deactivate(&self) {
        self.workers.end();
        self.is_reset_due.store(false, Ordering::SeqCst);
    }

    fn save(&self) -> Vec<u8> {
        postcard::to_stdvec(&SavedVsock {}).unwrap_or_default()
    }

    fn restore(&self, saved: &[u8]) -> Result<(), DeviceError> {
        let SavedVsock {} = self.description.saved(saved)?;
        self.is_reset_due.store(true, Ordering::SeqCst);
        Ok(())
    }
}
