//! Network interfaces (VIRTIO 1.2, 5.1) whose other end is a tap of the host.
//!
//! | to read about | open |
//! |---|---|
//! | what the guest sees of one | `config.rs`, `features.rs` |
//! | how a user asks for one | `options.rs` |
//! | the tap, and the calls of it | `tap.rs`, `sys.rs` |
//! | a pair of queues and its thread | `pair.rs` |
//! | a frame's way in, and out | `receive.rs`, `transmit.rs` |
//! | what the driver says of it | `control.rs`, `link.rs` |
//! | how the network learns that a guest has come | `announce.rs` |

mod announce;
mod config;
mod control;
mod features;
mod link;
mod options;
mod pair;
mod receive;
mod sys;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use config::{MAX_PAIRS, MTU, MacAddress, MacError, NetConfig};
pub use options::{NetBackend, NetError, NetOptions};
pub use tap::{Tap, TapError, TapSource};

use super::{Activation, DeviceFault, VirtioDevice, Worker, Workers};
use crate::devices::host::Host;
use crate::devices::{DeviceDescription, DeviceError};
use link::{Agreed, Link};
use pair::Pair;

/// What it is called in the table of devices.
pub const KIND: &str = "virtio-net";
/// Its type.
const TYPE: u32 = 1;
/// Entries of each queue: as many as Linux fills with buffers of a page, for the longest frames.
const QUEUE_SIZE: u16 = 256;
/// Bytes of the configuration space: `mac`, `status`, `max_virtqueue_pairs`, `mtu`.
const CONFIG_BYTES: usize = 12;

/// What an interface holds besides its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedNet {
    pairs: u16,
    offloads: Option<u64>,
    is_announcing: bool,
}

/// A network interface.
#[derive(Debug)]
pub struct VirtioNet {
    description: DeviceDescription,
    config: NetConfig,
    queue_sizes: Vec<u16>,
    link: Arc<Link>,
    workers: Workers,
}

impl VirtioNet {
    /// An interface of this description with this other end.
    ///
    /// # Errors
    /// When the description makes no sense, or the other end does not do for it.
    pub fn new(description: &DeviceDescription, backend: &NetBackend) -> Result<Self, DeviceError> {
        let config: NetConfig = description.config()?;
        let (id, kind) = (description.id.clone(), description.kind.clone());
        if let Some(why) = config.why_not() {
            return Err(DeviceError::Config { id, kind, why });
        }
        if let Some(why) = backend.why_not(&config) {
            return Err(DeviceError::Host { id, cause: io::Error::other(why) });
        }
        Ok(Self {
            description: description.clone(),
            config,
            queue_sizes: vec![QUEUE_SIZE; 2 * usize::from(config.pairs) + 1],
            link: Arc::new(Link::new(Arc::clone(&backend.tap), config.mac)),
            workers: Workers::default(),
        })
    }

    /// The tap does not work any more.
    fn has_no_tap(&self, cause: &io::Error) -> DeviceError {
        let name = self.link.tap().name();
        let why = format!("the tap '{name}' has gone ({cause}); make it anew, or name another one, and migrate again");
        DeviceError::Gone { id: self.description.id.clone(), cause: io::Error::other(why) }
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let NetConfig { mac, mtu, pairs, .. } = self.config;
        let mut space = [0; CONFIG_BYTES];
        space[..6].copy_from_slice(&mac.bytes());
        for (at, value) in [(6, self.link.status()), (8, pairs), (10, mtu)] {
            space[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        space
    }
}

/// The device of this description.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    host: &mut Host,
) -> Result<Arc<dyn VirtioDevice>, DeviceError> {
    let id = &description.id;
    let none = || {
        let why =
            format!("the guest has a network interface '{id}', and no tap is given for it; say --net id={id},tap=NAME");
        DeviceError::Host { id: id.clone(), cause: io::Error::other(why) }
    };
    Ok(Arc::new(VirtioNet::new(description, host.backends.nets.get(id).ok_or_else(none)?)?))
}

impl VirtioDevice for VirtioNet {
    fn device_type(&self) -> u32 {
        TYPE
    }

    fn features(&self) -> u64 {
        features::offered(&self.config)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config_space(), offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceFault> {
        let pairs = if activation.has(features::MQ) { self.config.pairs } else { 1 };
        // The control queue is behind those of as many pairs as there can be then (5.1.2).
        let control = activation.has(features::CTRL_VQ).then_some(2 * pairs);
        self.link.begin(activation.features, Arc::clone(&activation.notify));
        let worker = |number: u16| {
            let control = control.filter(|_| number == 0);
            let first = usize::from(2 * number);
            let mut queues = activation.queues[first..first + 2].to_vec();
            queues.extend(control.map(|index| Arc::clone(&activation.queues[usize::from(index)])));
            let name =
                if pairs == 1 { self.description.id.to_string() } else { format!("{}.{number}", self.description.id) };
            Worker::new(&name, &activation, &queues, Pair::new(&activation, &self.link, number, control, pairs))
        };
        self.workers.set((0..pairs).map(worker).collect::<Result<Vec<_>, _>>()?);
        Ok(())
    }

    fn workers(&self) -> &Workers {
        &self.workers
    }

    fn deactivate(&self) {
        self.workers.end();
        self.link.end();
    }

    fn save(&self) -> Vec<u8> {
        let Agreed { pairs, offloads, is_announcing } = self.link.agreed();
        // A few numbers: there is nothing that could fail.
        postcard::to_stdvec(&SavedNet { pairs, offloads, is_announcing }).unwrap_or_default()
    }

    fn restore(&self, saved: &[u8]) -> Result<(), DeviceError> {
        let SavedNet { pairs, offloads, is_announcing } = self.description.saved(saved)?;
        if !(1..=self.config.pairs).contains(&pairs) {
            let (id, kind) = (self.description.id.clone(), self.description.kind.clone());
            return Err(DeviceError::Config { id, kind, why: format!("{pairs} pairs of queues are in use") });
        }
        let offloads = offloads.map(features::offloads_of);
        // What came for the guest before it stands still was for it where it was, and has been seen there.
        self.link.tap().discard_waiting().map_err(|cause| self.has_no_tap(&cause))?;
        self.link.arrive(Agreed { pairs, offloads, is_announcing });
        Ok(())
    }
}
