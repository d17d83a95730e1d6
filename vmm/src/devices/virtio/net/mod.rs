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
pub use options::{NetError, NetOptions};
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
    /// An interface of this description whose other end is `tap`.
    ///
    /// # Errors
    /// When the description makes no sense, or the tap does not do for it.
    pub fn new(description: &DeviceDescription, tap: Arc<Tap>) -> Result<Self, DeviceError> {
        let config: NetConfig = description.config()?;
        let (id, kind) = (description.id.clone(), description.kind.clone());
        if let Some(why) = config.why_not() {
            return Err(DeviceError::Config { id, kind, why });
        }
        if let Some(why) = does_not_do(&config, &tap) {
            return Err(DeviceError::Host { id, cause: io::Error::other(why) });
        }
        Ok(Self {
            description: description.clone(),
            config,
            queue_sizes: vec![QUEUE_SIZE; 2 * usize::from(config.pairs) + 1],
            link: Arc::new(Link::new(tap, config.mac)),
            workers: Workers::default(),
        })
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
    let tap = host.backends.nets.get(id).ok_or_else(none)?;
    Ok(Arc::new(VirtioNet::new(description, Arc::clone(tap))?))
}

/// What of it the tap does not have.
fn does_not_do(config: &NetConfig, tap: &Tap) -> Option<String> {
    let name = tap.name();
    let NetConfig { mtu, pairs, udp_segmentation, .. } = *config;
    if tap.queues() < usize::from(pairs) {
        return Some(format!(
            "it has {pairs} pairs of queues, and the tap '{name}' is open {} times; say queues={pairs}",
            tap.queues()
        ));
    }
    if tap.mtu() < u32::from(mtu) {
        let tap = tap.mtu();
        return Some(format!(
            "its MTU is {mtu} bytes, and that of the tap '{name}' {tap}; say ip link set {name} mtu {mtu}"
        ));
    }
    let is_missing = udp_segmentation && !tap.has_udp_segmentation();
    is_missing.then(|| "the guest sends datagrams in one piece, for which the host needs Linux 6.2 or later".into())
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

    fn resume(&self) {
        self.workers.resume();
        self.link.announce();
    }

    fn save(&self) -> Vec<u8> {
        let Agreed { pairs, offloads } = self.link.agreed();
        // A few numbers: there is nothing that could fail.
        postcard::to_stdvec(&SavedNet { pairs, offloads }).unwrap_or_default()
    }

    fn restore(&self, saved: &[u8]) -> Result<(), DeviceError> {
        let SavedNet { pairs, offloads } = self.description.saved(saved)?;
        if !(1..=self.config.pairs).contains(&pairs) {
            let (id, kind) = (self.description.id.clone(), self.description.kind.clone());
            return Err(DeviceError::Config { id, kind, why: format!("{pairs} pairs of queues are in use") });
        }
        let offloads = offloads.map(features::offloads_of);
        self.link.arrive(Agreed { pairs, offloads });
        Ok(())
    }
}
