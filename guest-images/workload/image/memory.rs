//! The workload's memory: both regions and the generations of the working set's pages.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::layout::Layout;
use crate::report::Bad;
use crate::{pages, tables};

/// The pages, by their number within the region.
#[derive(Clone, Copy)]
pub struct Memory {
    /// Where everything lies.
    pub layout: Layout,
    seed: u64,
}

impl Memory {
    /// Makes the regions reachable; writes nothing yet.
    pub fn new(layout: Layout, seed: u64) -> Self {
        let regions = layout.working_set.iter().chain(layout.cold.iter()).chain(layout.free.iter());
        let regions = regions.chain([&layout.table, &layout.devices]);
        regions.for_each(tables::map);
        Self { layout, seed }
    }

    /// Writes every page, generation 0.
    pub fn fill(&self) {
        for index in 0..self.layout.working_set.pages() {
            self.generation(index).store(0, Relaxed);
        }
        for extent in self.layout.working_set.iter().chain(self.layout.cold.iter()) {
            (extent.start..extent.end()).step_by(4096).for_each(|page| pages::fill(page, self.seed, 0));
        }
    }

    /// The generation of a page of the working set.
    fn generation(&self, index: u64) -> &AtomicU32 {
        // SAFETY: the table has a number for every page of the working set, and is RAM that nothing else uses.
        unsafe { AtomicU32::from_ptr((self.layout.table.start as *mut u32).add(index as usize)) }
    }

    /// Compares a page of the working set.
    #[inline]
    pub fn compare(&self, index: u64) -> Result<(), Bad> {
        let Some(page) = self.layout.working_set.page(index) else { return Ok(()) };
        pages::compare(page, self.seed, self.generation(index).load(Relaxed))
    }

    /// Compares a cold page.
    pub fn compare_cold(&self, index: u64) -> Result<(), Bad> {
        let Some(page) = self.layout.cold.page(index) else { return Ok(()) };
        pages::compare(page, self.seed, 0)
    }

    /// Rewrites a page of the working set as of its next generation.
    #[inline]
    pub fn rewrite(&self, index: u64) {
        let Some(page) = self.layout.working_set.page(index) else { return };
        let next = self.generation(index).load(Relaxed).wrapping_add(1);
        pages::fill(page, self.seed, next);
        self.generation(index).store(next, Relaxed);
    }
}
