//! What was cold stays cold: pages of the cold lane are paged out again once a window of them has landed.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use memory_agent::{ByteSize, PageOutReport};

use crate::ram::{GuestRam, PageSet, RamError, RamPage};

/// The most cold memory that is let be in memory at a time, whatever the source offers.
const MOST: ByteSize = ByteSize::mib(256);

/// Cold pages that have landed and are still in memory.
#[derive(Debug)]
pub(super) struct ColdWindow {
    awake: Mutex<PageSet>,
    window: u64,
}

impl ColdWindow {
    /// A window that lets at most `window` of `pages` pages be resident, and no more than [`MOST`].
    pub(super) fn new(pages: u64, window: ByteSize) -> Self {
        let window = window.min(MOST).pages().min(pages).max(1);
        Self { awake: Mutex::new(PageSet::new(pages)), window }
    }

    /// These cold pages have landed; pages out all that are resident when the window is full, or `most` are.
    pub(super) fn landed(
        &self,
        ram: &GuestRam,
        runs: impl Iterator<Item = Range<RamPage>>,
        most: u64,
    ) -> Result<(), RamError> {
        let full = {
            let mut awake = self.lock();
            runs.for_each(|run| awake.insert_range(run));
            awake.len() >= self.window.min(most)
        };
        if full { self.page_out(ram).map(drop) } else { Ok(()) }
    }

    /// These pages have come again, warm.
    pub(super) fn warmed(&self, run: Range<RamPage>) {
        self.lock().remove_range(run);
    }

    /// Pages out all that are resident.
    pub(super) fn page_out(&self, ram: &GuestRam) -> Result<PageOutReport, RamError> {
        let runs: Vec<_> = {
            let mut awake = self.lock();
            let runs = awake.runs().collect();
            awake.clear();
            runs
        };
        ram.page_out_landed(&runs)
    }

    fn lock(&self) -> MutexGuard<'_, PageSet> {
        self.awake.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_that_is_offered_is_bounded() {
        let window = |pages, bytes| ColdWindow::new(pages, ByteSize(bytes)).window;
        assert_eq!(window(1 << 20, 16 << 20), 4096);
        assert_eq!(window(1 << 20, u64::MAX), MOST.pages());
        assert_eq!(window(1000, u64::MAX), 1000);
        assert_eq!(window(1000, 0), 1);
    }
}
