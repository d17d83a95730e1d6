//! What the destination does not have yet.

use std::ops::Range;

use crate::ram::{PageSet, RamPage};
use memory_agent::PageNumber;

/// What a fault at the destination asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The source has the page and does not know yet that it is wanted.
    Ask,
    /// Whoever lands the page wakes the guest.
    Wait,
    /// The page has landed meanwhile.
    Wake,
    /// The page was never written: it reads as zeros. Or it was there before the guest.
    Fill,
}

/// What the destination does not have yet.
#[derive(Clone, Debug)]
pub struct Missing {
    missing: PageSet,
    landing: PageSet,
    landed: PageSet,
    requested: PageSet,
    unconfirmed: PageSet,
}

impl Missing {
    /// Nothing is missing, of so many pages.
    pub fn new(pages: u64) -> Self {
        Self {
            missing: PageSet::new(pages),
            landing: PageSet::new(pages),
            landed: PageSet::new(pages),
            requested: PageSet::new(pages),
            unconfirmed: PageSet::new(pages),
        }
    }

    /// These come later.
    pub fn later(&mut self, pages: Range<RamPage>) {
        self.missing.insert_range(pages);
    }

    /// Pages that have not landed.
    pub fn left(&self) -> u64 {
        self.missing.len() + self.landing.len()
    }

    /// Pages that the guest waits for.
    pub fn requested(&self) -> u64 {
        self.requested.len()
    }

    /// The pages that the guest waits for, in order: to ask for them again.
    pub fn requested_pages(&self) -> Vec<Range<RamPage>> {
        self.requested.runs().collect()
    }

    /// All pages that have not landed, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<RamPage>> + '_ {
        self.missing.runs()
    }

    /// The guest has touched a page that is not mapped.
    pub fn fault(&mut self, page: RamPage) -> Fault {
        if self.landing.contains(page) {
            self.requested.insert_range(page.run(1));
            Fault::Wait
        } else if self.landed.contains(page) {
            Fault::Wake
        } else if !self.missing.contains(page) {
            Fault::Fill
        } else if self.requested.contains(page) {
            Fault::Wait
        } else {
            self.requested.insert_range(page.run(1));
            Fault::Ask
        }
    }

    /// A page has arrived. Whether it is to land: once, and never over what the guest has written since.
    pub fn arrived(&mut self, page: RamPage) -> bool {
        let is_missing = self.missing.contains(page);
        if is_missing {
            self.missing.remove_range(page.run(1));
            self.landing.insert_range(page.run(1));
        }
        is_missing
    }

    /// These could not land: they are missing again.
    pub fn failed(&mut self, pages: Range<RamPage>) {
        self.landing.remove_range(pages.clone());
        self.missing.insert_range(pages);
    }

    /// These have landed; whether the guest waits for any of them.
    pub fn landed(&mut self, pages: Range<RamPage>) -> bool {
        let is_requested = self.requested.count_in(pages.clone()) > 0;
        self.landing.remove_range(pages.clone());
        self.landed.insert_range(pages.clone());
        self.requested.remove_range(pages.clone());
        self.unconfirmed.insert_range(pages);
        is_requested
    }

    /// Pages that have landed and are to be confirmed.
    pub fn unconfirmed(&self) -> u64 {
        self.unconfirmed.len()
    }

    /// What has landed since the last call: to be confirmed.
    pub fn take_unconfirmed(&mut self) -> Vec<Range<RamPage>> {
        let runs = self.unconfirmed.runs().collect();
        self.unconfirmed.clear();
        runs
    }
}
