//! Which page goes when. Pure: no I/O, no clock, no machine.
//!
//! Every page is in one of three places: owed by the hot lane, owed by the cold lane, or owed by neither, which means
//! that the destination has its current content. What a probe says moves a page between the lanes; only delivery takes
//! it out of them, and only a write puts it back. A probe that lies costs time, never content.

mod postcopy;

use std::ops::Range;

use memory_agent::{PageRange, PageState, Residency};
pub use postcopy::{BLOCK, Fault, Missing, Outstanding};

use crate::ram::{PageSet, RamPage};

/// What happens to pages that the host has swapped out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColdPolicy {
    /// Read a window at a time, sent, and paged out again before the next: the source never grows by more than a window.
    Paced,
    /// Read like all others, and left in memory on both sides.
    Eager,
    /// Left where they are until the guest runs at the destination: they come when it touches them, and at a bounded rate.
    Lazy,
}

/// How many pages are still owed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owed {
    /// By the hot lane.
    pub hot: u64,
    /// By the cold lane.
    pub cold: u64,
}

/// What the destination is owed.
#[derive(Clone, Debug)]
pub struct Plan {
    hot: PageSet,
    cold: PageSet,
    policy: ColdPolicy,
}

impl Plan {
    /// At the start everything is owed. `residency` tells which lane: swapped pages go by the cold lane, unless the
    /// policy is to treat all alike.
    pub fn new(residency: &Residency<RamPage>, policy: ColdPolicy) -> Self {
        let mut plan = Self { hot: PageSet::full(residency.len()), cold: PageSet::new(residency.len()), policy };
        for run in residency.runs().filter(|run| run.state == PageState::Swapped) {
            plan.found_swapped(run.pages);
        }
        plan
    }

    /// The guest or the monitor wrote these pages: they are owed, and warm.
    pub fn written(&mut self, pages: &PageSet) {
        self.cold.remove_all(pages);
        self.hot.insert_all(pages);
    }

    /// Pages that turn out to be swapped: what the hot lane owes of them goes by the cold one.
    pub fn found_swapped(&mut self, pages: Range<RamPage>) {
        if self.policy != ColdPolicy::Eager {
            move_pages(&mut self.hot, &mut self.cold, pages);
        }
    }

    /// Pages that turn out not to be swapped (any more): what the cold lane owes of them goes by the hot one.
    pub fn found_resident(&mut self, pages: Range<RamPage>) {
        move_pages(&mut self.cold, &mut self.hot, pages);
    }

    /// These pages, with the content they have now, are on their way.
    pub fn sent(&mut self, pages: Range<RamPage>) {
        self.hot.remove_range(pages.clone());
        self.cold.remove_range(pages);
    }

    /// The next pages of the hot lane at or behind `from`: runs in order, at most `most` pages together.
    pub fn next_hot(&self, from: RamPage, most: u64) -> Vec<Range<RamPage>> {
        next(&self.hot, from, most)
    }

    /// The next pages of the cold lane: runs in order, at most a window of `most` pages together.
    pub fn next_cold(&self, most: u64) -> Vec<Range<RamPage>> {
        next(&self.cold, RamPage(0), most)
    }

    /// Whether the hot lane owes this page.
    pub fn owes_hot(&self, page: RamPage) -> bool {
        self.hot.contains(page)
    }

    /// How much is still owed.
    pub fn owed(&self) -> Owed {
        Owed { hot: self.hot.len(), cold: self.cold.len() }
    }

    /// What is owed now is left to post-copy.
    pub fn into_outstanding(self) -> Outstanding {
        Outstanding::new(self.hot, self.cold)
    }

    /// The pages that the cold lane owes.
    pub fn cold(&self) -> impl Iterator<Item = Range<RamPage>> + '_ {
        self.cold.runs()
    }

    /// All pages that are owed, in order.
    pub fn owed_ranges(&self) -> Vec<Range<RamPage>> {
        let mut all = self.hot.clone();
        all.insert_all(&self.cold);
        all.runs().collect()
    }

    /// Whether the destination has the current content of every page.
    pub fn is_complete(&self) -> bool {
        self.hot.is_empty() && self.cold.is_empty()
    }
}

fn move_pages(from: &mut PageSet, to: &mut PageSet, pages: Range<RamPage>) {
    let runs: Vec<_> = from.runs_in(pages.clone()).collect();
    runs.into_iter().for_each(|run| to.insert_range(run));
    from.remove_range(pages);
}

fn next(set: &PageSet, mut from: RamPage, most: u64) -> Vec<Range<RamPage>> {
    let mut runs = Vec::new();
    let mut left = most;
    while left > 0 {
        let Some(run) = set.next_run(from, left) else { break };
        left -= run.page_count();
        from = run.end;
        runs.push(run);
    }
    runs
}

#[cfg(test)]
mod tests {
    use memory_agent::PageNumber;
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 200;

    /// A page as the naive model sees it: its version here, and the version the destination has.
    #[derive(Clone, Copy, Default)]
    struct Page {
        version: u64,
        delivered: Option<u64>,
    }

    #[derive(Clone, Debug)]
    enum Event {
        Write(Range<RamPage>),
        FoundSwapped(Range<RamPage>),
        FoundResident(Range<RamPage>),
        SendHot(RamPage, u64),
        SendCold(u64),
    }

    fn range() -> impl Strategy<Value = Range<RamPage>> {
        (0..PAGES, 1u64..40).prop_map(|(start, length)| RamPage::range(start..(start + length).min(PAGES)))
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            range().prop_map(Event::Write),
            range().prop_map(Event::FoundSwapped),
            range().prop_map(Event::FoundResident),
            (0..PAGES, 1u64..64).prop_map(|(from, most)| Event::SendHot(RamPage(from), most)),
            (1u64..64).prop_map(Event::SendCold),
        ]
    }

    fn residency() -> impl Strategy<Value = Residency<RamPage>> {
        let state = prop_oneof![Just(PageState::Hole), Just(PageState::Resident), Just(PageState::Swapped)];
        prop::collection::vec((state, 1u64..30), 1..20).prop_map(|runs| {
            let mut map = Residency::default();
            for (state, pages) in runs {
                map.push(pages.min(PAGES - map.len()), state);
            }
            map.push(PAGES - map.len(), PageState::Hole);
            map
        })
    }

    fn policy() -> impl Strategy<Value = ColdPolicy> {
        prop_oneof![Just(ColdPolicy::Paced), Just(ColdPolicy::Eager), Just(ColdPolicy::Lazy)]
    }

    proptest! {
        /// Whatever is written, found and sent, in whatever order, and whatever the probe says: a page is owed exactly
        /// when the destination does not have its current version, and sending what is owed ends.
        #[test]
        fn nothing_is_lost_and_nothing_is_sent_for_nothing(
            residency in residency(),
            policy in policy(),
            events in prop::collection::vec(event(), 0..60),
        ) {
            let mut plan = Plan::new(&residency, policy);
            let mut pages = [Page::default(); PAGES as usize];
            let send = |plan: &mut Plan, pages: &mut [Page], runs: Vec<Range<RamPage>>| {
                for run in runs {
                    for page in run.pages() {
                        let p = &mut pages[page.number() as usize];
                        assert_ne!(p.delivered, Some(p.version), "page {page} was not owed");
                        p.delivered = Some(p.version);
                    }
                    plan.sent(run);
                }
            };
            for event in events {
                match event {
                    Event::Write(range) => {
                        let mut set = PageSet::new(PAGES);
                        set.insert_range(range.clone());
                        range.pages().for_each(|page| pages[page.number() as usize].version += 1);
                        plan.written(&set);
                    }
                    Event::FoundSwapped(range) => plan.found_swapped(range),
                    Event::FoundResident(range) => plan.found_resident(range),
                    Event::SendHot(from, most) => {
                        let runs = plan.next_hot(from, most);
                        prop_assert!(runs.iter().map(|r| r.page_count()).sum::<u64>() <= most);
                        send(&mut plan, &mut pages, runs);
                    }
                    Event::SendCold(most) => {
                        let runs = plan.next_cold(most);
                        prop_assert!(runs.iter().map(|r| r.page_count()).sum::<u64>() <= most);
                        send(&mut plan, &mut pages, runs);
                    }
                }
                let owed = pages.iter().filter(|p| p.delivered != Some(p.version)).count() as u64;
                prop_assert_eq!(plan.owed().hot + plan.owed().cold, owed);
                if policy == ColdPolicy::Eager {
                    prop_assert_eq!(plan.owed().cold, 0);
                }
            }
            while !plan.is_complete() {
                let runs = [plan.next_hot(RamPage(0), 32), plan.next_cold(32)].concat();
                prop_assert!(!runs.is_empty());
                send(&mut plan, &mut pages, runs);
            }
            prop_assert!(pages.iter().all(|p| p.delivered == Some(p.version)));
        }
    }
}
