//! Announcements of a guest that has been moved (Virtio 1.2, 5.1.6.5.4): the device asks for one in its status, and hears over the
//! control queue that it has been sent.

use super::queue::{Descriptor, Queue, Rings};
use super::transport::{DeviceError, Transport};
use crate::arena::{self, Arena};
use crate::frame;
use crate::traps::Signal;

const STATUS: u64 = 1 << 16;
const CONTROL: u64 = 1 << 17;
const ANNOUNCE: u64 = 1 << 21;
/// What the device has to offer for it.
pub const FEATURES: u64 = STATUS | CONTROL | ANNOUNCE;

/// Index of the control queue, behind one pair; and of the vector of the configuration, behind those of queues.
const CONTROL_QUEUE: u16 = 2;
const CONFIG_VECTOR: u16 = 3;

/// The bit of the device's status, which is the second half of the second word of its configuration.
const S_ANNOUNCE: u32 = 2 << 16;
const STATUS_WORD: u64 = 4;
/// `VIRTIO_NET_CTRL_ANNOUNCE`, `VIRTIO_NET_CTRL_ANNOUNCE_ACK`.
const ACKNOWLEDGE: [u8; 2] = [3, 0];

/// Where in its page what lies: the frame behind its header, the command, and the answer.
const HEADER: u64 = 12;
const COMMAND: u64 = 1024;
const ANSWER: u64 = 2048;

/// What the device is told in its own words.
pub struct Announcer {
    transport: Transport,
    control: Queue,
    page: u64,
    /// Interrupts of the configuration that have been looked at.
    seen: u64,
    /// Announcements that were asked for and sent.
    pub count: u64,
}

impl Announcer {
    /// Of a device that has agreed on [`FEATURES`], with this address, before it begins.
    pub fn new(transport: &Transport, mac: [u8; 6], arena: &mut Arena) -> Result<Self, DeviceError> {
        let rings = Rings::new(transport.queue_size(CONTROL_QUEUE, 64)?, arena);
        let control = transport.queue(CONTROL_QUEUE, rings, Signal::NetConfig);
        transport.signal_changes(CONFIG_VECTOR, Signal::NetConfig);
        let page = arena.zeroed(4096);
        arena::bytes(page + HEADER, frame::ANNOUNCEMENT).copy_from_slice(&frame::announcement(mac));
        arena::bytes(page + COMMAND, 2).copy_from_slice(&ACKNOWLEDGE);
        Ok(Self { transport: *transport, control, page, seen: 0, count: 0 })
    }

    /// Whether the device has said that its configuration has changed.
    #[inline]
    pub fn is_told(&mut self) -> bool {
        let count = Signal::NetConfig.count();
        core::mem::replace(&mut self.seen, count) != count
    }

    /// Looks at the status, which is an exit; the frame to be sent if one is asked for. The device is told of the one before first.
    pub fn look(&mut self) -> Option<Descriptor> {
        while self.control.take().is_some() {}
        let is_asked = self.control.under_way == 0 && self.transport.config(STATUS_WORD) & S_ANNOUNCE != 0;
        is_asked.then(|| Descriptor::readable(self.page, (HEADER as usize + frame::ANNOUNCEMENT) as u32))
    }

    /// Tells the device that the frame is on its way.
    pub fn acknowledge(&mut self) {
        self.count += 1;
        let command = Descriptor::readable(self.page + COMMAND, ACKNOWLEDGE.len() as u32);
        self.control.offer(0, &[command, Descriptor::writable(self.page + ANSWER, 1)]);
        self.control.kick();
    }
}
