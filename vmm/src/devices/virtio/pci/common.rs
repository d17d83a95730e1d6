//! The common configuration structure (VIRTIO 1.2, 4.1.4.3): what a driver selects, accepts and sets up. Whoever holds it knows
//! the rest: status and vectors change under a worker's hands, and are in [`Shared`].

use serde::{Deserialize, Serialize};

use super::shared::Shared;
use crate::devices::virtio::{QueueSetup, VirtioDevice};

/// Bits of the device status (2.1).
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const DRIVER_OK: u8 = 4;
pub(super) const NEEDS_RESET: u8 = 64;

/// Feature bits that are the transport's and the rings' (chapter 6).
const F_INDIRECT_DESC: u32 = 28;
pub(super) const F_EVENT_IDX: u32 = 29;
const F_VERSION_1: u32 = 32;

/// Offsets of the fields.
const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
pub(super) const STATUS: usize = 0x14;
const GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFF: usize = 0x1e;
const QUEUE_DESCRIPTORS: usize = 0x20;
const QUEUE_AVAILABLE: usize = 0x28;
const QUEUE_USED: usize = 0x30;
/// Behind the last that there is without `VIRTIO_F_NOTIFICATION_DATA` and `VIRTIO_F_RING_RESET`, which would follow and read as 0.
const END: usize = 0x38;

/// What a driver has selected, accepted and set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommonConfig {
    /// Which half of the offered features is read.
    pub device_feature_select: u32,
    /// Which half of the accepted features is written.
    pub driver_feature_select: u32,
    /// The features that the driver accepts.
    pub driver_features: u64,
    /// Which queue the queue registers are about.
    pub queue_select: u16,
    /// Each queue, as the driver has set it up.
    #[serde(deserialize_with = "crate::bounded::at_most::<_, _, 256>")]
    pub queues: Vec<QueueSetup>,
}

/// All that is offered to the driver of a device.
pub(super) fn offered(device: &dyn VirtioDevice) -> u64 {
    device.features() | 1 << F_VERSION_1 | 1 << F_EVENT_IDX | 1 << F_INDIRECT_DESC
}

impl CommonConfig {
    /// As after reset, for queues with at most so many entries each.
    pub(super) fn new(queue_sizes: &[u16]) -> Self {
        let queues = queue_sizes.iter().map(|size| QueueSetup { size: *size, ..QueueSetup::default() }).collect();
        Self { device_feature_select: 0, driver_feature_select: 0, driver_features: 0, queue_select: 0, queues }
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Whether a device that offers these can work with what the driver accepts: nothing else, and not without version 1.
    pub(super) fn has_possible_features(&self, offered: u64) -> bool {
        self.driver_features & !offered == 0 && self.driver_features >> F_VERSION_1 & 1 == 1
    }

    /// Fills `data` from the structure at `offset`; with zeros behind its end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], offered: u64, shared: &Shared) {
        let mut bytes = [0; END];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(offered, self.device_feature_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(CONFIG_VECTOR, &shared.config_vector().to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(STATUS, &[shared.status()]);
        put(GENERATION, &[shared.generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queue() {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &shared.queue_vector(self.queue_select).to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.is_enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(QUEUE_AVAILABLE, &queue.available.to_le_bytes());
            put(QUEUE_USED, &queue.used.to_le_bytes());
        }
        crate::devices::virtio::read_config_space(&bytes, offset, data);
    }

    /// Takes `data` for the field at `offset`, all but the status. A field is written whole, one of 64 bits also by its halves.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], queue_sizes: &[u16], shared: &Shared) {
        let mut bytes = [0; 8];
        let Some(place) = bytes.get_mut(..data.len()) else { return };
        place.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let status = shared.status();
        match (offset as usize, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (DRIVER_FEATURE, 4) if status & FEATURES_OK == 0 => self.accept(value as u32),
            (CONFIG_VECTOR, 2) => shared.set_config_vector(value as u16),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_VECTOR, 2) => shared.set_queue_vector(self.queue_select, value as u16),
            // A driver that has said DRIVER_OK sets up no queues (3.1.1).
            (at, width) if status & DRIVER_OK == 0 => self.write_queue(at, width, value, queue_sizes),
            _ => {}
        }
    }

    fn accept(&mut self, features: u32) {
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features = self.driver_features & !(u64::from(u32::MAX) << shift) | u64::from(features) << shift;
    }

    fn write_queue(&mut self, at: usize, width: usize, value: u64, queue_sizes: &[u16]) {
        let index = usize::from(self.queue_select);
        let (Some(queue), Some(most)) = (self.queues.get_mut(index), queue_sizes.get(index)) else { return };
        match (at, width) {
            (QUEUE_SIZE, 2) if value.is_power_of_two() && value <= u64::from(*most) => queue.size = value as u16,
            (QUEUE_ENABLE, 2) => queue.is_enabled |= value == 1,
            (QUEUE_DESCRIPTORS..END, 4 | 8) if at.is_multiple_of(width) => {
                let address = match at & !7 {
                    QUEUE_DESCRIPTORS => &mut queue.descriptors,
                    QUEUE_AVAILABLE => &mut queue.available,
                    _ => &mut queue.used,
                };
                let shift = at % 8 * 8;
                let mask = if width == 8 { u64::MAX } else { u64::from(u32::MAX) << shift };
                *address = *address & !mask | value << shift;
            }
            _ => {}
        }
    }
}

/// The low or the high 32 bits; nothing behind them.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
