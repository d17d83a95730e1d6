//! A split virtqueue (VIRTIO 1.2, 2.7), shared by the transport, which sets it up, and the worker, which serves it.

use std::io;
use std::num::Wrapping;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Chain, DeviceFault, Notify};
use crate::ram::GuestRam;

/// Bytes before the entries of the available and of the used ring, and of an entry of the latter (VIRTIO 1.2, 2.7.6 and 2.7.8).
const AVAILABLE_RING_HEADER: u64 = 4;
const USED_RING_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// A queue as a driver sets it up, and how far both have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Number of entries.
    pub size: u16,
    /// Whether the driver uses it.
    pub is_enabled: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// The entry of the available ring that the device takes next.
    pub next_available: u16,
    /// The entry of the used ring that the device fills next.
    pub next_used: u16,
}

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

    /// Becomes what the driver has set up, with the positions in its rings, or stays unused.
    ///
    /// # Errors
    /// When the rings are not aligned, or not in RAM.
    pub(crate) fn set_up(&self, setup: &QueueSetup, has_event_idx: bool, ram: &GuestRam) -> Result<(), DeviceFault> {
        let QueueSetup { size, is_enabled, descriptors, available, used, next_available, next_used } = *setup;
        let mut ring = self.ring();
        ring.reset();
        if !is_enabled {
            return Ok(());
        }
        let fault = |why: String| DeviceFault::Queue { queue: self.index, why };
        let invalid = |e: virtio_queue::Error| fault(e.to_string());
        ring.try_set_size(size).map_err(invalid)?;
        ring.try_set_desc_table_address(GuestAddress(descriptors)).map_err(invalid)?;
        ring.try_set_avail_ring_address(GuestAddress(available)).map_err(invalid)?;
        ring.try_set_used_ring_address(GuestAddress(used)).map_err(invalid)?;
        ring.set_event_idx(has_event_idx);
        ring.set_next_avail(next_available);
        ring.set_next_used(next_used);
        ring.set_ready(true);
        if !ring.is_valid(ram.memory()) {
            ring.set_ready(false);
            return Err(fault("its rings are not all in RAM".into()));
        }
        Ok(())
    }

    /// Unused, as before it was set up, and no notification is left.
    pub(crate) fn reset(&self) {
        self.ring().reset();
        // Fails where none has come.
        let _ = self.kick.read();
    }

    /// Whether the driver uses it.
    pub fn is_ready(&self) -> bool {
        self.ring().ready()
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
        let ring = self.ring();
        let told = Wrapping(ring.next_used());
        QueueLock { index: self.index, ring, ram, notify, told }
    }
}

/// A queue while it is served.
#[derive(Debug)]
pub struct QueueLock<'a> {
    index: u16,
    ring: MutexGuard<'a, Queue>,
    ram: &'a Arc<GuestRam>,
    notify: &'a dyn Notify,
    /// The entry of the used ring that came next when the driver was told last, or when this began.
    told: Wrapping<u16>,
}

impl QueueLock<'_> {
    /// Whether the driver uses it.
    pub fn is_ready(&self) -> bool {
        self.ring.ready()
    }

    /// The next chain that the driver offers, if there is one. If there is none, the driver has been asked to notify of the next:
    /// with an event index it does so only for the one that it was asked for last (2.7.7.2).
    ///
    /// # Errors
    /// When ring or chain are not what they must be.
    pub fn pop(&mut self) -> Result<Option<Chain>, DeviceFault> {
        let mut chain = Chain::default();
        Ok(self.pop_into(&mut chain)?.then_some(chain))
    }

    /// As [`QueueLock::pop`], into a chain that has been used up, whose memory is used again; whether there is one.
    ///
    /// # Errors
    /// As [`QueueLock::pop`].
    pub fn pop_into(&mut self, chain: &mut Chain) -> Result<bool, DeviceFault> {
        match self.try_pop_into(chain)? {
            false if self.enable_kicks()? => self.try_pop_into(chain),
            popped => Ok(popped),
        }
    }

    /// As [`QueueLock::pop`], of a driver that goes on not notifying: whoever looks again by itself.
    ///
    /// # Errors
    /// When ring or chain are not what they must be.
    pub fn pop_quietly(&mut self) -> Result<Option<Chain>, DeviceFault> {
        let mut chain = Chain::default();
        Ok(self.pop_quietly_into(&mut chain)?.then_some(chain))
    }

    /// As [`QueueLock::pop_quietly`], into a chain that has been used up.
    ///
    /// # Errors
    /// When ring or chain are not what they must be.
    pub fn pop_quietly_into(&mut self, chain: &mut Chain) -> Result<bool, DeviceFault> {
        self.try_pop_into(chain)
    }

    /// Whether the driver offers one more.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn has_more(&self) -> Result<bool, DeviceFault> {
        let next = self.ring.avail_idx(self.ram.memory(), Ordering::Acquire).map_err(fault(self.index))?;
        Ok(next.0 != self.ring.next_avail())
    }

    fn try_pop_into(&mut self, chain: &mut Chain) -> Result<bool, DeviceFault> {
        let memory = self.ram.memory();
        let mut offered = self.ring.iter(memory).map_err(fault(self.index))?;
        let Some(descriptors) = offered.next() else { return Ok(false) };
        chain.walk(self.index, self.ram, descriptors)?;
        Ok(true)
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

    /// Writes the chain down as the one that is given back `ahead` places behind the next. The driver sees it when all are
    /// [published](QueueLock::publish): those of one frame have to be there at once (5.1.6.4).
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn fill(&mut self, ahead: u16, head: u16, written: u32) -> Result<(), DeviceFault> {
        let slot = self.ring.next_used().wrapping_add(ahead) % self.ring.size();
        let element = (u64::from(written) << 32 | u64::from(head)).to_le();
        let at = GuestAddress(self.ring.used_ring() + USED_RING_HEADER + USED_ELEMENT * u64::from(slot));
        self.ram.memory().write_obj(element, at).map_err(|e| self.fault(e.to_string()))
    }

    /// Gives the first `count` chains back that have been [filled](QueueLock::fill) in. Tell the driver before the queue is let go.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn publish(&mut self, count: u16) -> Result<(), DeviceFault> {
        let next = self.ring.next_used().wrapping_add(count);
        self.ring.set_next_used(next);
        let at = GuestAddress(self.ring.used_ring() + 2);
        let stored = self.ram.memory().store(next.to_le(), at, Ordering::Release);
        stored.map_err(|e| self.fault(e.to_string()))
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// What is wrong with what the driver has put into this queue.
    pub fn fault(&self, why: String) -> DeviceFault {
        DeviceFault::Queue { queue: self.index, why }
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
        // virtio-queue counts what was pushed and not what was published, and knows nothing of the older flag (2.7.7).
        let wants_pushed = self.ring.needs_notification(self.ram.memory())?;
        let next = Wrapping(self.ring.next_used());
        let told = std::mem::replace(&mut self.told, next);
        let available = self.ring.avail_ring();
        if !self.ring.event_idx_enabled() {
            return Ok(u32::from(self.load(available)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = self.load(available + AVAILABLE_RING_HEADER + 2 * u64::from(self.ring.size()))?;
        Ok(wants_pushed || next - Wrapping(event) - Wrapping(1) < next - told)
    }

    fn load(&self, at: u64) -> Result<u16, virtio_queue::Error> {
        let value = self.ram.memory().load(GuestAddress(at), Ordering::Relaxed);
        value.map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)
    }
}

fn fault(queue: u16) -> impl FnOnce(virtio_queue::Error) -> DeviceFault {
    move |e| DeviceFault::Queue { queue, why: e.to_string() }
}
