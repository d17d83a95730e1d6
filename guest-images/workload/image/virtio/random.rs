//! The source of randomness (Virtio 1.2, 5.4).

use super::queue::{Descriptor, Queue, Rings};
use super::transport::{DeviceError, EVENT_INDEX, Kind, Transport};
use super::{Patience, Setting};
use crate::arena::{self, Arena};
use crate::bars::Window;
use crate::device_report::RandomBytes;
use crate::traps::Signal;

const MOST: u32 = 4096;
const PATIENCE_US: u64 = 10_000_000;

/// The source.
pub struct Source {
    queue: Queue,
    buffer: u64,
    setting: Setting,
}

impl Source {
    /// The first.
    pub fn find(setting: Setting, window: &mut Window, arena: &mut Arena) -> Result<Self, DeviceError> {
        let mut transport = Transport::find(Kind::Random, setting.interrupts, window)?;
        transport.negotiate(EVENT_INDEX)?;
        let rings = Rings::new(transport.queue_size(0, 8)?, arena);
        let queue = transport.queue(0, rings, Signal::Random);
        transport.start();
        Ok(Self { queue, buffer: arena.zeroed(u64::from(MOST)), setting })
    }

    /// Reads so many bytes, or as many as came in time.
    pub fn read(&mut self, wanted: u64, patience: &mut Patience<'_>) -> RandomBytes {
        let frequency = self.setting.frequency;
        let start = patience.clock.read();
        let (mut bytes, mut ones) = (0, 0);
        while bytes < wanted {
            let length = (wanted - bytes).min(u64::from(MOST)) as u32;
            self.queue.offer(0, &[Descriptor::writable(self.buffer, length)]);
            self.queue.kick();
            let mut used = None;
            patience.wait(frequency, PATIENCE_US, || {
                used = self.queue.take();
                used.is_some()
            });
            let Some(used) = used else { break };
            let got = used.length.min(length);
            if got == 0 {
                break;
            }
            bytes += u64::from(got);
            ones +=
                arena::bytes(self.buffer, got as usize).iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        }
        RandomBytes { bytes, ones, took_us: frequency.us(patience.clock.read().saturating_sub(start)) }
    }
}
