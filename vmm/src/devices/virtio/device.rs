//! What every virtio device is, whatever the transport.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::{Virtqueue, Workers};
use crate::devices::{DeviceError, Handover, StillBusy};
use crate::ram::GuestRam;

/// Why a device needs to be reset before it goes on (VIRTIO 1.2, 2.1.1, `DEVICE_NEEDS_RESET`).
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    /// The rings or a chain are not what the specification allows.
    #[error("queue {queue}: {why}")]
    Queue {
        /// Which one.
        queue: u16,
        /// What is wrong with it.
        why: String,
    },
    /// The host refuses what the device cannot do without.
    #[error("{what}: {cause}")]
    Host {
        /// What the device was about to do.
        what: &'static str,
        /// What the host said.
        cause: io::Error,
    },
}

/// By what a device tells its driver something.
pub trait Notify: Send + Sync + Debug {
    /// Buffers of this queue have been used.
    fn queue(&self, queue: u16);

    /// The device's configuration has changed.
    fn config(&self);

    /// The device works no more until it is reset: sets `DEVICE_NEEDS_RESET`, tells the driver, and says why in the log.
    fn needs_reset(&self, fault: &DeviceFault);
}

/// What a driver has agreed on with a device when it sets `DRIVER_OK`.
#[derive(Clone, Debug)]
pub struct Activation {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// Feature bits that both have accepted.
    pub features: u64,
    /// All queues of the device, by index. One that the driver does not use is not [ready](super::QueueLock::is_ready).
    pub queues: Vec<Arc<Virtqueue>>,
    /// By what the driver is told.
    pub notify: Arc<dyn Notify>,
}

impl Activation {
    /// Whether both have accepted the feature of this bit.
    pub fn has(&self, feature: u32) -> bool {
        self.features >> feature & 1 == 1
    }
}

/// A virtio device. The transport owns its queues and its status; the device serves the queues between
/// [`VirtioDevice::activate`] and [`VirtioDevice::deactivate`], in threads of its own ([`Workers`]).
pub trait VirtioDevice: Send + Sync + Debug {
    /// Its type (VIRTIO 1.2, 5), such as 2 for a block device.
    fn device_type(&self) -> u32;

    /// The feature bits it offers. Those of the transport and the rings are the transport's to add.
    fn features(&self) -> u64;

    /// The most entries of each of its queues, a power of two each.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from its configuration space at `offset`; with zeros behind the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes `data` for its configuration space at `offset`; ignores what cannot be written.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Gets ready to serve its queues, at rest: it works from [`VirtioDevice::resume`] on, which the transport calls at once when the
    /// machine runs, and then begins with the buffers that are there already.
    ///
    /// # Errors
    /// When the host does not give what it takes; the driver is told that the device needs a reset.
    fn activate(&self, activation: Activation) -> Result<(), DeviceFault>;

    /// The threads that serve its queues.
    fn workers(&self) -> &Workers;

    /// Is told to end what it does, and to leave its queues alone. Waits for nothing.
    fn deactivate(&self) {
        self.workers().end();
    }

    /// Whether it may still touch guest memory or its queues, after [`VirtioDevice::deactivate`].
    fn is_active(&self) -> bool {
        self.workers().are_active()
    }

    /// Comes to rest, as [`Device::pause`](crate::devices::Device::pause). So does one that has not been activated.
    ///
    /// # Errors
    /// When it is still at work at `deadline`.
    fn pause(&self, deadline: Instant) -> Result<(), StillBusy> {
        self.workers().pause(deadline)
    }

    /// Goes on, if it has been activated.
    fn resume(&self) {
        self.workers().resume();
    }

    /// Takes a step of its guest's way to another host, or back, as [`Device::hand_over`](crate::devices::Device::hand_over).
    ///
    /// # Errors
    /// As there.
    fn hand_over(&self, step: Handover, deadline: Instant) -> Result<(), DeviceError> {
        let _ = (step, deadline);
        Ok(())
    }

    /// What it holds besides its queues and what was negotiated, as bytes of its own. It is at rest.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Looks at what it has saved, and becomes it. It is at rest, and has not been activated.
    ///
    /// # Errors
    /// When the bytes make no sense.
    fn restore(&self, saved: &[u8]) -> Result<(), DeviceError> {
        let _ = saved;
        Ok(())
    }
}
