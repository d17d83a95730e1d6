//! What the vCPUs share: orders from the console, figures from the work.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::report::Bad;

/// The orders. The first vCPU writes them, both obey.
pub struct Orders {
    /// Work, or leave the pages alone.
    pub running: AtomicBool,
    /// The second vCPU keeps off the pages while this is set, and says so in [`Figures::paused`].
    pub pause: AtomicBool,
    /// Page operations a second over all vCPUs, 0 for no limit.
    pub rate: AtomicU64,
    /// Percent of the operations that write.
    pub writes: AtomicU32,
}

pub static ORDERS: Orders = Orders {
    running: AtomicBool::new(false),
    pause: AtomicBool::new(false),
    rate: AtomicU64::new(0),
    writes: AtomicU32::new(0),
};

/// Bad pages told by each vCPU; further ones are only counted.
pub const TOLD: usize = 8;

/// What one vCPU did and saw. Written by that vCPU only, except `longest_stall`, which the first resets.
pub struct Figures {
    pub up: AtomicBool,
    pub paused: AtomicBool,
    pub iterations: AtomicU64,
    pub checked: AtomicU64,
    pub errors: AtomicU64,
    pub longest_stall: AtomicU64,
    bad: [[AtomicU64; 4]; TOLD],
    bad_count: AtomicU32,
}

impl Figures {
    const fn new() -> Self {
        Self {
            up: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            iterations: AtomicU64::new(0),
            checked: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            longest_stall: AtomicU64::new(0),
            bad: [const { [const { AtomicU64::new(0) }; 4] }; TOLD],
            bad_count: AtomicU32::new(0),
        }
    }

    /// Counts one more.
    #[inline]
    pub fn count(counter: &AtomicU64) {
        counter.store(counter.load(Relaxed) + 1, Relaxed);
    }

    /// Counts a bad page, and keeps it for telling if it is among the first.
    pub fn found(&self, bad: &Bad) {
        Self::count(&self.errors);
        let index = self.bad_count.load(Relaxed);
        if let Some(slot) = self.bad.get(index as usize) {
            let words = [bad.page, u64::from(bad.word), bad.expected, bad.found];
            slot.iter().zip(words).for_each(|(slot, word)| slot.store(word, Relaxed));
            self.bad_count.store(index + 1, core::sync::atomic::Ordering::Release);
        }
    }

    /// The bad page number `index`, if there were so many.
    pub fn bad(&self, index: u32) -> Option<Bad> {
        if index >= self.bad_count.load(core::sync::atomic::Ordering::Acquire) {
            return None;
        }
        let [page, word, expected, found] = self.bad.get(index as usize)?.each_ref().map(|word| word.load(Relaxed));
        Some(Bad { page, word: word as u32, expected, found })
    }
}

pub static FIGURES: [Figures; 2] = [Figures::new(), Figures::new()];

/// The sum of a counter over both vCPUs.
pub fn sum(counter: fn(&Figures) -> &AtomicU64) -> u64 {
    FIGURES.iter().map(|figures| counter(figures).load(Relaxed)).sum()
}

/// Set when a vCPU is about to tell its last words on the console, which the other then leaves alone.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Asks the other vCPU to leave the console alone.
pub fn silence() {
    SILENT.store(true, Relaxed);
}

/// Whether the console is taken for last words.
pub fn silenced() -> bool {
    SILENT.load(Relaxed)
}
