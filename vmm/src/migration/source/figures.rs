//! What the migration was like for this host, for its report.

use std::time::{Duration, Instant};

use memory_agent::{Counts, SwapCounters};

use crate::migration::progress::SourceResidency;
use crate::ram::{GuestRam, RamError};

/// Residency and swap activity here since the beginning.
pub(super) struct Figures {
    started: Instant,
    before: Counts,
    /// The most resident pages seen.
    peak: u64,
    swap_before: Option<SwapCounters>,
}

impl Figures {
    pub(super) fn new() -> Self {
        Self { started: Instant::now(), before: Counts::default(), peak: 0, swap_before: SwapCounters::read().ok() }
    }

    /// How long ago that was.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// What guest RAM is before anything of it is read.
    pub(super) fn look_before(&mut self, ram: &GuestRam) -> Result<(), RamError> {
        self.before = ram.counts()?;
        self.peak = self.before.resident;
        Ok(())
    }

    /// How many pages are resident now.
    pub(super) fn look(&mut self, ram: &GuestRam) -> Result<(), RamError> {
        self.peak = self.peak.max(ram.counts()?.resident);
        Ok(())
    }

    /// Pages swapped in and out on this host so far, by anyone.
    pub(super) fn swaps(&self) -> SwapCounters {
        let since = self.swap_before.zip(SwapCounters::read().ok());
        since.map(|(before, now)| now.since(&before)).unwrap_or_default()
    }

    /// How residency has changed. Of a migration that has succeeded: figures that cannot be had must not make it fail.
    pub(super) fn residency(&self, ram: &GuestRam) -> SourceResidency {
        let after = ram.counts().unwrap_or_default();
        SourceResidency {
            resident_before: self.before.resident,
            resident_peak: self.peak.max(after.resident),
            resident_after: after.resident,
            swapped_before: self.before.swapped,
            swapped_after: after.swapped,
        }
    }
}
