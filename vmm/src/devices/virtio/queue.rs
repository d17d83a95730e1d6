//! A split virtqueue (VIRTIO 1.2, 2.7), shared by the transport, which sets it up, and the worker, which serves it.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Chain, DeviceFault, Notify};
use crate::ram::GuestRam;

/// One queue of a device.
#[derive(Debug)]
pub struct Virtqueue {
    index: u16,
    ring: Mutex<Queue>,
    /// Set when the driver has made buffers available.
    kick: EventFd,
}

impl Virtqueue {
    /// A queue with at most `max_size` entries, a power of two, as after reset.
    ///
    /// # Errors
    /// When the host has no descriptor left, or no queue can be so large.
    pub fn new(index: u16, max_size: u16) -> io::Result<Self> {
        let ring = Queue::new(max_size).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
        Ok(Self { index, ring: Mutex::new(ring), kick: EventFd::new(libc::EFD_NONBLOCK)? })
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The event that the driver's notification sets.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The rings, for whoever sets them up, saves or restores them. Held for as short as can be.
    pub(crate) fn ring(&self) -> MutexGuard<'_, Queue> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is saved of it.
    pub fn state(&self) -> QueueState {
        self.ring().state()
    }

    /// To serve it: nobody else changes it meanwhile.
    pub fn lock<'a>(&'a self, ram: &'a Arc<GuestRam>, notify: &'a dyn Notify) -> QueueLock<'a> {
        QueueLock { index: self.index, ring: self.ring(), ram, notify }
    }
}

/// A queue while it is served.
#[derive(Debug)]
pub struct QueueLock<'a> {
    index: u16,
    ring: MutexGuard<'a, Queue>,
    ram: &'a Arc<GuestRam>,
    notify: &'a dyn Notify,
}

impl QueueLock<'_> {
    /// Whether the driver uses it.
    pub fn is_ready(&self) -> bool {
        self.ring.ready()
    }

    /// The next chain that the driver offers, if there is one.
    ///
    /// # Errors
    /// When ring or chain are not what they must be.
    pub fn pop(&mut self) -> Result<Option<Chain>, DeviceFault> {
        let memory = self.ram.memory();
        let mut offered = self.ring.iter(memory).map_err(fault(self.index))?;
        let chain = offered.next().map(|chain| Chain::new(self.index, self.ram, chain));
        chain.transpose()
    }

    /// Puts the chain that was taken last back, for the next [`QueueLock::pop`].
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back of which the device has written `written` bytes.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), DeviceFault> {
        self.ring.add_used(self.ram.memory(), head, written).map_err(fault(self.index))
    }

    /// Tells the driver of what was given back, if it wants to know.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn notify(&mut self) -> Result<(), DeviceFault> {
        if self.wants_interrupt().map_err(fault(self.index))? {
            self.notify.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to notify while the device looks by itself.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn disable_kicks(&mut self) -> Result<(), DeviceFault> {
        self.ring.disable_notification(self.ram.memory()).map_err(fault(self.index))
    }

    /// Asks the driver to notify again; whether there is something already.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn enable_kicks(&mut self) -> Result<bool, DeviceFault> {
        self.ring.enable_notification(self.ram.memory()).map_err(fault(self.index))
    }

    fn wants_interrupt(&mut self) -> Result<bool, virtio_queue::Error> {
        let wanted = self.ring.needs_notification(self.ram.memory())?;
        if self.ring.event_idx_enabled() {
            return Ok(wanted);
        }
        // virtio-queue looks at the event index alone, not at the older flag (2.7.7).
        let flags: u16 = self
            .ram
            .memory()
            .load(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

fn fault(queue: u16) -> impl FnOnce(virtio_queue::Error) -> DeviceFault {
    move |e| DeviceFault::Queue { queue, why: e.to_string() }
}
