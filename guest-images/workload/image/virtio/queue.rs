//! A split virtqueue (Virtio 1.2, 2.7), of which the driver decides which descriptors a request uses.

use core::ptr;
use core::sync::atomic::{Ordering, fence};

use crate::arena::Arena;
use crate::mmio;

/// In a descriptor: another follows.
pub const NEXT: u16 = 1;
/// In a descriptor: the device writes it.
pub const WRITABLE: u16 = 2;
/// In a descriptor: it is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// In the available ring's flags: no interrupts.
const NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: need not be told.
const NO_NOTIFY: u16 = 1;

/// A descriptor as the device reads it.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// A buffer that the device reads.
    pub const fn readable(address: u64, length: u32) -> Self {
        Self { address, length, flags: 0, next: 0 }
    }

    /// A buffer that the device writes.
    pub const fn writable(address: u64, length: u32) -> Self {
        Self { address, length, flags: WRITABLE, next: 0 }
    }
}

/// A request that the device is done with.
#[derive(Clone, Copy)]
pub struct Used {
    /// Its first descriptor.
    pub head: u16,
    /// Bytes that the device says it has written.
    pub length: u32,
}

/// Memory of a queue, which outlives the device's resets.
#[derive(Clone, Copy)]
pub struct Rings {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl Rings {
    /// Rings of so many descriptors, a power of two, at most 256.
    pub fn new(size: u16, arena: &mut Arena) -> Self {
        let start = arena.zeroed(3 * 4096);
        Self { size, descriptors: start, available: start + 4096, used: start + 8192 }
    }
}

/// How a queue tells the device, and hears from it.
#[derive(Clone, Copy)]
pub struct Bell {
    /// The register that tells the device.
    pub doorbell: u64,
    /// What is written there.
    pub index: u16,
    /// Whether both sides say at which request they want to hear of it (`VIRTIO_F_EVENT_IDX`).
    pub event_index: bool,
    /// Whether the device interrupts.
    pub interrupts: bool,
}

/// A queue at work.
pub struct Queue {
    rings: Rings,
    bell: Bell,
    /// Requests handed over so far; like the ring's, it wraps.
    offered: u16,
    /// How many of them the device was told of, or need not be.
    told: u16,
    /// Requests taken back so far.
    taken: u16,
    /// Requests handed over and not taken back.
    pub under_way: u16,
    /// Times that the device was told.
    pub kicks: u64,
}

fn store<T>(address: u64, value: T) {
    // SAFETY: rings and tables are RAM of this driver's; the device looks at them too, so it is volatile.
    unsafe { ptr::write_volatile(address as *mut T, value) };
}

fn load<T: Copy>(address: u64) -> T {
    // SAFETY: as above.
    unsafe { ptr::read_volatile(address as *const T) }
}

impl Queue {
    /// An empty queue in these rings.
    pub fn new(rings: Rings, bell: Bell) -> Self {
        let queue = Self { rings, bell, offered: 0, told: 0, taken: 0, under_way: 0, kicks: 0 };
        let Rings { available, used, .. } = rings;
        [available, available + 2, used, used + 2].into_iter().for_each(|field| store(field, 0u16));
        if !bell.interrupts && !bell.event_index {
            store(available, NO_INTERRUPT);
        }
        queue.want_no_interrupt();
        queue
    }

    /// Descriptors in the table.
    pub fn size(&self) -> u16 {
        self.rings.size
    }

    /// Hands over a request of these parts, in descriptors from `head` on, none of which is in use.
    #[inline]
    pub fn offer(&mut self, head: u16, parts: &[Descriptor]) {
        for (index, part) in parts.iter().enumerate() {
            let (at, is_last) = (head + index as u16, index + 1 == parts.len());
            let flags = if is_last { part.flags } else { part.flags | NEXT };
            self.write(at, Descriptor { flags, next: at + 1, ..*part });
        }
        self.publish(head);
    }

    /// Hands over a request whose parts are in a table of their own, at an address that has room for them.
    #[inline]
    pub fn offer_indirect(&mut self, head: u16, table: u64, parts: &[Descriptor]) {
        for (index, part) in parts.iter().enumerate() {
            let is_last = index + 1 == parts.len();
            let flags = if is_last { part.flags } else { part.flags | NEXT };
            store(table + index as u64 * 16, Descriptor { flags, next: index as u16 + 1, ..*part });
        }
        self.write(head, Descriptor { address: table, length: parts.len() as u32 * 16, flags: INDIRECT, next: 0 });
        self.publish(head);
    }

    /// Writes a descriptor as it is.
    pub fn write(&mut self, index: u16, descriptor: Descriptor) {
        store(self.rings.descriptors + u64::from(index) * 16, descriptor);
    }

    /// Hands over the chain that starts at `head`, whatever it is.
    #[inline]
    pub fn publish(&mut self, head: u16) {
        store(self.rings.available + 4 + 2 * u64::from(self.offered % self.rings.size), head);
        self.offered = self.offered.wrapping_add(1);
        self.under_way = self.under_way.wrapping_add(1);
        fence(Ordering::Release);
        store(self.rings.available + 2, self.offered);
    }

    /// Says that so many more chains are there than are.
    pub fn claim(&mut self, more: u16) {
        store(self.rings.available + 2, self.offered.wrapping_add(more));
        self.ring();
    }

    /// Tells the device of what was handed over, if it wants to hear of it.
    #[inline]
    pub fn kick(&mut self) {
        let (old, new) = (self.told, self.offered);
        if old == new {
            return;
        }
        self.told = new;
        // What was handed over is to be seen before the device's wish is looked at.
        fence(Ordering::SeqCst);
        let wanted = if self.bell.event_index {
            let event: u16 = load(self.rings.used + 4 + 8 * u64::from(self.rings.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            load::<u16>(self.rings.used) & NO_NOTIFY == 0
        };
        if wanted {
            self.ring();
        }
    }

    /// Tells the device.
    pub fn ring(&mut self) {
        mmio::write_u16(self.bell.doorbell, self.bell.index);
        self.kicks += 1;
    }

    /// Takes back a request that the device is done with.
    #[inline]
    pub fn take(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let entry = self.rings.used + 4 + 8 * u64::from(self.taken % self.rings.size);
        let (head, length): (u32, u32) = (load(entry), load(entry + 4));
        self.taken = self.taken.wrapping_add(1);
        assert!(head < u32::from(self.rings.size), "the device answers what it was not asked");
        self.under_way = self.under_way.wrapping_sub(1);
        self.want_no_interrupt();
        Some(Used { head: head as u16, length })
    }

    /// What was taken last answers nothing that is under way.
    pub fn was_repeated(&mut self) {
        self.under_way = self.under_way.wrapping_add(1);
    }

    fn has_used(&self) -> bool {
        load::<u16>(self.rings.used + 2) != self.taken
    }

    /// Asks for an interrupt at the next request that is done; whether one is there already.
    pub fn want_interrupt(&mut self) -> bool {
        if self.bell.event_index {
            store(self.event(), self.taken);
        }
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Where an interrupt is wanted, it is at a request that is long done.
    fn want_no_interrupt(&self) {
        if self.bell.event_index {
            store(self.event(), self.taken.wrapping_sub(1));
        }
    }

    fn event(&self) -> u64 {
        self.rings.available + 4 + 2 * u64::from(self.rings.size)
    }
}
