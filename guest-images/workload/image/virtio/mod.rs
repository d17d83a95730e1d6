//! Virtio 1.2 over PCI: the transport, split queues, and the drivers, one a device. They poll, or are interrupted.
//!
//! A device that answers what it was not asked ends the machine with a sentence.

pub mod announce;
pub mod balloon;
pub mod block;
pub mod hostile;
pub mod net;
pub mod queue;
pub mod random;
pub mod transport;

use crate::clock::Clock;
use crate::console::Console;
use crate::tsc::Frequency;

/// What drivers need to know.
#[derive(Clone, Copy)]
pub struct Setting {
    pub frequency: Frequency,
    /// Chooses contents and order.
    pub seed: u64,
    /// Interrupts, or polling.
    pub interrupts: bool,
}

/// Where a driver that waits says so.
pub struct Patience<'a> {
    pub console: &'a mut Console,
    pub clock: &'a mut Clock,
}

impl Patience<'_> {
    /// Waits until `done`, at most so many microseconds; whether it came. The console goes on.
    pub fn wait(&mut self, frequency: Frequency, us: u64, mut done: impl FnMut() -> bool) -> bool {
        let start = self.clock.read();
        while !done() {
            let now = self.clock.read();
            if now.saturating_sub(start) > frequency.ticks(us) {
                return false;
            }
            self.console.tell(now, self.clock);
        }
        true
    }
}
