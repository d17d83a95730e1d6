//! Guest RAM that is filled in while the guest runs: whoever touches a page that has not landed waits.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use memory_agent::{
    FaultError, LandingView, MissingFaults, NotFilled, PAGE_SIZE, Page, PageNumber, PageRange, PageState, Registered,
};

use super::{GuestRam, RamError, RamPage};

/// Pages that could not all be put where they belong.
#[derive(Debug)]
pub struct NotLanded {
    /// So many of them, from the first on, have landed, now or before.
    pub landed: u64,
    /// Why the next one has not.
    pub why: RamError,
}

/// What post-copy does to guest RAM at the destination: holes are filled in, and whoever touches one meanwhile waits.
pub trait MissingPages: AsFd + Send + Sync {
    /// Gives the pages that have been touched since the last call to `each`. Waits for nothing: the descriptor is readable when
    /// there are some.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn read(&self, each: &mut dyn FnMut(RamPage)) -> Result<(), RamError>;

    /// Fills the holes from page `first` on with `data`, whole pages, and wakes whoever waits for them, who need not fault
    /// again to have them mapped. What is there already stays what it is.
    ///
    /// # Errors
    /// When the range is not all RAM, or the host has no memory.
    fn fill(&self, first: RamPage, data: &[u8]) -> Result<(), NotLanded>;

    /// The same for pages that nobody waits for: they are in nobody's page table then, and nobody is woken.
    ///
    /// # Errors
    /// As [`MissingPages::fill`].
    fn land(&self, first: RamPage, data: &[u8]) -> Result<(), NotLanded>;

    /// Fills a hole with zeros and wakes whoever waits for it; a page that is there stays what it is.
    ///
    /// # Errors
    /// When the host has no memory.
    fn zero(&self, page: RamPage) -> Result<(), RamError>;

    /// Wakes whoever waits for pages that have landed.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn wake(&self, pages: Range<RamPage>) -> Result<(), RamError>;

    /// Ends all of it: whoever waits goes on, and holes read as zeros.
    fn release(&self);
}

/// Faults on the holes of guest RAM, in RAM page numbers. When this is dropped, holes read as zeros again.
///
/// Whoever holds this must not touch guest memory through its mapping: it would wait for itself.
#[derive(Debug)]
pub struct MissingRam {
    ram: Arc<GuestRam>,
    faults: MissingFaults,
    /// In the order of the regions.
    regions: Vec<(Registered, LandingView)>,
}

impl MissingRam {
    /// From now on whoever touches a hole waits.
    ///
    /// # Errors
    /// When this user may not handle a guest's faults.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, RamError> {
        let faults = MissingFaults::open()?;
        let regions = ram
            .mappings()?
            .iter()
            .map(|mapping| Ok((faults.register(mapping)?, faults.landing_view(mapping)?)))
            .collect::<Result<_, FaultError>>()?;
        Ok(Self { ram, faults, regions })
    }

    /// Puts `data` where it belongs from page `first` on, region by region.
    fn put(
        &self,
        first: RamPage,
        data: &[u8],
        put: impl Fn(&(Registered, LandingView), &Range<Page>, &[u8]) -> Result<(), NotFilled>,
    ) -> Result<(), NotLanded> {
        let pages = first.run(data.len() as u64 / PAGE_SIZE);
        self.ram.check(&pages).map_err(|why| NotLanded { landed: 0, why })?;
        let mut rest = data;
        for part in self.ram.layout().split(pages) {
            let length = part.local.byte_count() as usize;
            let (some, behind) = rest.split_at(length);
            put(&self.regions[part.region], &part.local, some).map_err(|NotFilled { filled, cause }| NotLanded {
                landed: part.pages.start - first + filled,
                why: cause.into(),
            })?;
            rest = behind;
        }
        Ok(())
    }
}

impl MissingPages for MissingRam {
    fn read(&self, each: &mut dyn FnMut(RamPage)) -> Result<(), RamError> {
        let page_of = |address| {
            self.ram.layout().parts().zip(&self.regions).find_map(|(part, (registered, _))| {
                let page = registered.page_of(address)?;
                Some(part.in_ram(&page.run(1)).start)
            })
        };
        Ok(self.faults.read(|address| page_of(address).into_iter().for_each(&mut *each))?)
    }

    fn fill(&self, first: RamPage, data: &[u8]) -> Result<(), NotLanded> {
        self.put(first, data, |(region, _), pages, data| self.faults.fill(region, pages, data))
    }

    fn land(&self, first: RamPage, data: &[u8]) -> Result<(), NotLanded> {
        self.put(first, data, |(_, view), pages, data| self.faults.land(view, pages, data))
    }

    fn zero(&self, page: RamPage) -> Result<(), RamError> {
        for part in self.ram.layout().split(page.run(1)) {
            self.faults.zero(&self.regions[part.region].0, part.local.start)?;
        }
        Ok(())
    }

    fn wake(&self, pages: Range<RamPage>) -> Result<(), RamError> {
        self.ram.check(&pages)?;
        for part in self.ram.layout().split(pages) {
            self.faults.wake(&self.regions[part.region].0, &part.local)?;
        }
        Ok(())
    }

    fn release(&self) {
        for (region, _) in &self.regions {
            // Closing the descriptor does the same for all of them, should one be refused.
            let _ = self.faults.unregister(region);
        }
    }
}

impl AsFd for MissingRam {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }
}

impl Drop for MissingRam {
    fn drop(&mut self) {
        self.release();
    }
}

impl GuestRam {
    /// Makes sure that the pages are holes, so that whoever touches one is noticed. What landed beside may have been given a
    /// huge page, which reaches into them; the guest must not have run since.
    ///
    /// # Errors
    /// When they cannot be made holes.
    pub fn make_holes(&self, ranges: impl IntoIterator<Item = Range<RamPage>>) -> Result<(), RamError> {
        /// The kernel splits a huge page unless somebody looks at it just then.
        const TRIES: u32 = 10;
        for range in ranges {
            let mut tries = 0;
            while let Some(page) = self.first_data(&range)? {
                if tries == TRIES {
                    return Err(RamError::NoHole(page));
                }
                tries += 1;
                self.punch(range.clone())?;
            }
        }
        Ok(())
    }

    /// The first page of the range that is no hole.
    fn first_data(&self, range: &Range<RamPage>) -> Result<Option<RamPage>, RamError> {
        let residency = self.residency(range.clone())?;
        let first = |state| residency.ranges_of(state).next().map(|run| run.start);
        Ok(first(PageState::Resident).into_iter().chain(first(PageState::Swapped)).min())
    }
}

/// Why faults of a guest's cannot be handled on this host, if they cannot.
pub fn why_no_faults() -> Option<FaultError> {
    MissingFaults::open().err()
}
