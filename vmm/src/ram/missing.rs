//! Guest RAM that is filled in while the guest runs: whoever touches a page that has not landed waits.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use memory_agent::{FaultError, MissingFaults, PAGE_SIZE, Registered};

use super::{GuestRam, RamError};

/// Faults on the holes of guest RAM, in RAM page numbers. When this is dropped, holes read as zeros again.
///
/// Whoever holds this must not touch guest memory through its mapping: it would wait for itself.
#[derive(Debug)]
pub struct MissingRam {
    ram: Arc<GuestRam>,
    faults: MissingFaults,
    /// In the order of the regions.
    regions: Vec<Registered>,
}

impl MissingRam {
    /// From now on whoever touches a hole waits.
    ///
    /// # Errors
    /// When this user may not handle a guest's faults.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, RamError> {
        let faults = MissingFaults::open()?;
        let regions = ram.mappings()?.iter().map(|mapping| faults.register(mapping)).collect::<Result<_, _>>()?;
        Ok(Self { ram, faults, regions })
    }

    /// Gives the pages that have been touched since the last call to `each`. Waits for nothing: the descriptor is readable when
    /// there are some.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn read(&self, mut each: impl FnMut(u64)) -> Result<(), RamError> {
        let page_of = |address| {
            let mut first = 0;
            for (region, registered) in self.ram.layout().regions().iter().zip(&self.regions) {
                if let Some(page) = registered.page_of(address) {
                    return Some(first + page);
                }
                first += region.pages();
            }
            None
        };
        Ok(self.faults.read(|address| page_of(address).into_iter().for_each(&mut each))?)
    }

    /// Fills the holes from page `first` on with `data`, whole pages, and wakes whoever waits for them, who need not fault
    /// again to have them mapped.
    ///
    /// # Errors
    /// When the range is not all RAM, one is no hole any more, or the host has no memory.
    pub fn fill(&self, first: u64, data: &[u8]) -> Result<(), RamError> {
        let pages = first..first.saturating_add(data.len() as u64 / PAGE_SIZE);
        self.ram.check(&pages)?;
        let mut rest = data;
        for part in self.ram.layout().split(pages) {
            let length = ((part.local.end - part.local.start) * PAGE_SIZE) as usize;
            let (some, behind) = rest.split_at(length);
            self.faults.fill(&self.regions[part.region], &part.local, some)?;
            rest = behind;
        }
        Ok(())
    }

    /// Fills a hole with zeros and wakes whoever waits for it; a page that is there stays what it is.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn zero(&self, page: u64) -> Result<(), RamError> {
        for part in self.ram.layout().split(page..page + 1) {
            self.faults.zero(&self.regions[part.region], part.local.start)?;
        }
        Ok(())
    }

    /// Wakes whoever waits for pages that have landed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wake(&self, pages: Range<u64>) -> Result<(), RamError> {
        self.ram.check(&pages)?;
        for part in self.ram.layout().split(pages) {
            self.faults.wake(&self.regions[part.region], &part.local)?;
        }
        Ok(())
    }
}

impl AsFd for MissingRam {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }
}

impl Drop for MissingRam {
    fn drop(&mut self) {
        for region in &self.regions {
            // Closing the descriptor does the same for all of them, should one be refused.
            let _ = self.faults.unregister(region);
        }
    }
}

/// Why faults of a guest's cannot be handled on this host, if they cannot.
pub fn why_no_faults() -> Option<FaultError> {
    MissingFaults::open().err()
}
