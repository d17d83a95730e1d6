//! A driver for tests, which lays rings and buffers into RAM as a guest does, rightly or not.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::{Activation, DeviceFault, Notify, Virtqueue};
use crate::ram::GuestRam;

/// How long something may take that is to happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Descriptor flags (VIRTIO 1.2, 2.7.5).
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where a device's notifications arrive.
#[derive(Debug, Default)]
pub(crate) struct Notified {
    pub(crate) queues: AtomicU32,
    pub(crate) configs: AtomicU32,
    faults: Mutex<Vec<String>>,
    changed: Condvar,
}

impl Notified {
    /// The first fault that the device reports, within [`LIMIT`].
    pub(crate) fn fault(&self) -> Option<String> {
        let faults = self.faults.lock().unwrap();
        let (faults, _) = self.changed.wait_timeout_while(faults, LIMIT, |faults| faults.is_empty()).unwrap();
        faults.first().cloned()
    }

    /// The faults so far.
    pub(crate) fn faults(&self) -> Vec<String> {
        self.faults.lock().unwrap().clone()
    }
}

impl Notify for Notified {
    fn queue(&self, _: u16) {
        self.queues.fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self) {
        self.configs.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self, fault: &DeviceFault) {
        self.faults.lock().unwrap().push(fault.to_string());
        self.changed.notify_all();
    }
}

/// One descriptor as it lies in RAM: address, length, flags, next.
pub(crate) type Raw = (u64, u32, u16, u16);

/// The driver's side of one queue.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) queue: Arc<Virtqueue>,
    pub(crate) size: u16,
    pub(crate) base: u64,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

impl Driver {
    /// A queue whose rings lie at `base`, which takes 16 KiB, ready to be served. `size` is at most 256.
    pub(crate) fn new(ram: &Arc<GuestRam>, index: u16, size: u16, base: u64) -> Self {
        let queue = Arc::new(Virtqueue::new(index, size).unwrap());
        let driver = Self { ram: Arc::clone(ram), queue, size, base, next_descriptor: 0, available: 0, used: 0 };
        {
            let mut ring = driver.queue.ring();
            ring.set_size(size);
            ring.set_desc_table_address(Some(base as u32), Some((base >> 32) as u32));
            let (avail, used) = (driver.avail_ring(), driver.used_ring());
            ring.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
            ring.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
            ring.set_ready(true);
        }
        driver
    }

    pub(crate) fn avail_ring(&self) -> u64 {
        self.base + 0x2000
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.base + 0x3000
    }

    /// Writes one descriptor.
    pub(crate) fn write_descriptor(&self, index: u16, (address, length, flags, next): Raw) {
        self.write_descriptor_at(self.base + 16 * u64::from(index), (address, length, flags, next));
    }

    /// Writes one descriptor at any address, such as into an indirect table.
    pub(crate) fn write_descriptor_at(&self, at: u64, (address, length, flags, next): Raw) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.ram.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain at descriptor `head` available, whatever is there.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.ram.memory().write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.ram.memory().store(self.available, GuestAddress(self.avail_ring() + 2), Ordering::SeqCst).unwrap();
    }

    /// Offers a chain of these buffers (address and length) and gives its head. Descriptors are taken in a circle.
    pub(crate) fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let buffers: Vec<_> = readable.iter().map(|b| (b, 0)).chain(writable.iter().map(|b| (b, WRITE))).collect();
        let at = |n: usize| (usize::from(self.next_descriptor) + n) as u16 % self.size;
        for (n, ((address, length), flags)) in buffers.iter().enumerate() {
            let next = if n + 1 < buffers.len() { NEXT } else { 0 };
            self.write_descriptor(at(n), (*address, *length, flags | next, at(n + 1)));
        }
        let head = at(0);
        self.next_descriptor = at(buffers.len());
        self.offer(head);
        head
    }

    /// Notifies the device.
    pub(crate) fn kick(&self) {
        self.queue.kick().write(1).unwrap();
    }

    /// The next chain that the device gives back, head and bytes written, within [`LIMIT`].
    pub(crate) fn used(&mut self) -> Option<(u32, u32)> {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(used) = self.try_used() {
                return Some(used);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        None
    }

    /// The next chain that the device has given back already.
    pub(crate) fn try_used(&mut self) -> Option<(u32, u32)> {
        let memory = self.ram.memory();
        let index: u16 = memory.load(GuestAddress(self.used_ring() + 2), Ordering::SeqCst).unwrap();
        if index == self.used {
            return None;
        }
        let at = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let (head, written): (u32, u32) =
            (memory.read_obj(GuestAddress(at)).unwrap(), memory.read_obj(GuestAddress(at + 4)).unwrap());
        Some((head, written))
    }
}

/// What the transport hands a device whose driver has these queues.
pub(crate) fn activation(drivers: &[&Driver], features: u64) -> (Activation, Arc<Notified>) {
    let notified = Arc::new(Notified::default());
    let queues = drivers.iter().map(|driver| Arc::clone(&driver.queue)).collect();
    let notify = Arc::clone(&notified) as Arc<dyn Notify>;
    (Activation { ram: Arc::clone(&drivers[0].ram), features, queues, notify }, notified)
}
