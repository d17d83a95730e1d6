//! What the destination is owed, and what has been delivered: which pages, of which class, and how often.

use std::ops::Range;

use memory_agent::{PageRange, PageState, Residency};

use crate::migration::plan::{ColdPolicy, Plan};
use crate::migration::progress::PagesByClass;
use crate::ram::{PageSet, RamPage};

/// What the destination is owed, and what it has had.
pub(super) struct Delivery {
    pub(super) plan: Plan,
    policy: ColdPolicy,
    /// Pages that were found swapped at any time before they were delivered.
    swapped: PageSet,
    /// Pages delivered at least once.
    delivered: PageSet,
    /// By how they were delivered the first time.
    pages: PagesByClass,
    /// Pages sent again because the guest wrote them.
    resent: u64,
}

impl Delivery {
    /// Everything is owed, of so many pages.
    pub(super) fn new(pages: u64, policy: ColdPolicy) -> Self {
        Self {
            plan: Plan::new(&Residency::uniform(pages, PageState::Resident), policy),
            policy,
            swapped: PageSet::new(pages),
            delivered: PageSet::new(pages),
            pages: PagesByClass::default(),
            resent: 0,
        }
    }

    /// Nothing has been sent yet, and this is what each page is. Returns the holes, which are to be sent as such.
    pub(super) fn classify(&mut self, residency: &Residency<RamPage>) -> Vec<Range<RamPage>> {
        self.plan = Plan::new(residency, self.policy);
        residency.ranges_of(PageState::Swapped).for_each(|run| self.swapped.insert_range(run));
        residency.ranges_of(PageState::Hole).map(|hole| self.hole(hole)).collect()
    }

    /// Pages by how they were delivered the first time.
    pub(super) fn pages(&self) -> PagesByClass {
        self.pages
    }

    /// Pages sent again because the guest wrote them.
    pub(super) fn resent(&self) -> u64 {
        self.resent
    }

    /// Pages that must be delivered before the guest can go.
    pub(super) fn owed_before_switchover(&self) -> u64 {
        let owed = self.plan.owed();
        if self.policy == ColdPolicy::Lazy { owed.hot } else { owed.hot + owed.cold }
    }

    /// These turn out to be swapped.
    pub(super) fn found_swapped(&mut self, run: Range<RamPage>) {
        self.swapped.insert_range(run.clone());
        self.plan.found_swapped(run);
    }

    /// These have never been written, or were given back: they go as zeros.
    pub(super) fn hole(&mut self, run: Range<RamPage>) -> Range<RamPage> {
        self.pages.hole += self.deliver(&run);
        self.plan.sent(run.clone());
        run
    }

    /// These have nothing in them: they go as zeros.
    pub(super) fn empty(&mut self, run: Range<RamPage>) -> Range<RamPage> {
        self.pages.zero += self.deliver(&run);
        self.plan.sent(run.clone());
        run
    }

    /// These were sent.
    pub(super) fn sent(&mut self, run: Range<RamPage>) {
        self.count_by_residency(&run);
        self.plan.sent(run);
    }

    /// Counts all that is left to post-copy: by its class, or as sent again.
    pub(super) fn count_outstanding(&mut self) {
        for run in self.plan.owed_ranges() {
            self.count_by_residency(&run);
        }
    }

    fn count_by_residency(&mut self, run: &Range<RamPage>) {
        let cold: u64 = self.delivered.gaps_in(run.clone()).map(|fresh| self.swapped.count_in(fresh)).sum();
        let fresh = self.deliver(run);
        self.pages.cold += cold;
        self.pages.hot += fresh - cold;
    }

    /// Takes the pages for delivered; returns how many are for the first time and counts the others as sent again.
    fn deliver(&mut self, run: &Range<RamPage>) -> u64 {
        let again = self.delivered.count_in(run.clone());
        self.delivered.insert_range(run.clone());
        self.resent += again;
        run.page_count() - again
    }
}
