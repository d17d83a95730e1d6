//! Reading time, and with it the longest stall: the largest gap between two readings on one vCPU.

use core::sync::atomic::Ordering::Relaxed;

use crate::control::Figures;
use crate::tsc;

/// One vCPU's clock. It is read between any two things that the vCPU does, so that whatever stops the vCPU shows as a
/// gap, be it in the middle of a page, of a line of output or of a sleep.
pub struct Clock {
    last: u64,
    figures: &'static Figures,
}

impl Clock {
    /// A clock that reports its gaps to `figures`.
    pub fn new(figures: &'static Figures) -> Self {
        Self { last: tsc::now(), figures }
    }

    /// The time.
    #[inline]
    pub fn read(&mut self) -> u64 {
        self.read_after(0)
    }

    /// The time, after something that was meant to take `ticks`: only what it took beyond them is a stall.
    #[inline]
    pub fn read_after(&mut self, ticks: u64) -> u64 {
        let now = tsc::now();
        // A counter that went backwards (another host's) is no gap.
        let gap = now.saturating_sub(self.last).saturating_sub(ticks);
        if gap > self.figures.longest_stall.load(Relaxed) {
            self.figures.longest_stall.fetch_max(gap, Relaxed);
        }
        self.last = now;
        now
    }
}
