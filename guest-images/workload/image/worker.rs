//! One vCPU's share of the work: page operations on its part of the working set, at its part of the rate.

use core::sync::atomic::Ordering::Relaxed;

use crate::control::{Figures, ORDERS};
use crate::memory::Memory;
use crate::pattern::Random;
use crate::tsc::Frequency;

/// The longest that work falls behind before what was missed is forgotten: after a stall the guest goes on at its
/// rate, without a burst that would not be there if it had not been stopped.
const BACKLOG_US: u64 = 20_000;

/// What a vCPU can do now.
pub enum Step {
    /// One operation is done; the next may be due.
    Done,
    /// Nothing is due: stopped, or ahead of the rate.
    Ahead,
}

/// The work of one vCPU.
pub struct Worker {
    memory: Memory,
    frequency: Frequency,
    figures: &'static Figures,
    first: u64,
    count: u64,
    cpus: u64,
    random: Random,
    /// When the next operation is due, if the rate is limited.
    due: u64,
}

impl Worker {
    /// The share of vCPU `cpu` of `cpus`.
    pub fn new(
        memory: Memory,
        frequency: Frequency,
        figures: &'static Figures,
        seed: u64,
        cpu: u64,
        cpus: u64,
    ) -> Self {
        let pages = memory.layout.working_set.pages();
        let (first, end) = (pages * cpu / cpus, pages * (cpu + 1) / cpus);
        let random = Random::new(seed.wrapping_add(cpu));
        Self { memory, frequency, figures, first, count: end - first, cpus, random, due: 0 }
    }

    /// Does the operation that is due at `now`, if one is.
    #[inline]
    pub fn step(&mut self, now: u64) -> Step {
        if !ORDERS.running.load(Relaxed) || self.count == 0 || !self.is_due(now) {
            return Step::Ahead;
        }
        let index = self.first + self.random.below(self.count);
        Figures::count(&self.figures.checked);
        if let Err(bad) = self.memory.compare(index) {
            self.figures.found(&bad);
        }
        if self.random.below(100) < u64::from(ORDERS.writes.load(Relaxed)) {
            self.memory.rewrite(index);
        }
        Figures::count(&self.figures.iterations);
        Step::Done
    }

    fn is_due(&mut self, now: u64) -> bool {
        let rate = ORDERS.rate.load(Relaxed);
        if rate == 0 {
            return true;
        }
        if now < self.due {
            // A rate that was raised, or a counter that went backwards: nothing is due later than one interval on.
            self.due = self.due.min(now.saturating_add(self.interval(rate)));
            return false;
        }
        let oldest = now.saturating_sub(self.frequency.ticks(BACKLOG_US));
        self.due = self.due.max(oldest) + self.interval(rate);
        true
    }

    fn interval(&self, rate: u64) -> u64 {
        self.frequency.khz * 1000 * self.cpus / rate
    }
}
