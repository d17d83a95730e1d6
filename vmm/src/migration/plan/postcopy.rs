//! What is still to come once the guest runs at the destination. Pure, like the plan of pre-copy: no I/O, no clock.
//!
//! The source keeps a page until the destination has confirmed it ([`Outstanding`]); the destination lets nobody see a page
//! before it has landed, and lands each once ([`Missing`]). A connection that breaks loses what was on its way, and nothing
//! else.

use std::ops::Range;

use crate::ram::PageSet;

/// Neighbours that go along with a page that is wanted: those in the same block of so many pages. What other numbers cost is in
/// `docs/kernel-facts.md`, "Waking".
pub const BLOCK: u64 = 32;

/// So many pages are looked at together for what is not on its way: more than there ever are on their way.
const AT_A_TIME: u64 = 1024;

/// What the source has and the destination has not confirmed.
#[derive(Clone, Debug)]
pub struct Outstanding {
    /// Warm when the guest was stopped: these go first.
    hot: PageSet,
    cold: PageSet,
    /// Sent, by this connection, and not confirmed.
    on_way: PageSet,
    /// Of these, what was sent over the channel by which pages are wanted: in front of whatever is sent over it next.
    ahead: PageSet,
    /// Those that could not be read: sent only when they are wanted, until they are tried again.
    unreadable: PageSet,
}

impl Outstanding {
    /// What pre-copy has left over.
    pub(super) fn new(hot: PageSet, cold: PageSet) -> Self {
        let none = PageSet::new(hot.universe());
        Self { hot, cold, on_way: none.clone(), ahead: none.clone(), unreadable: none }
    }

    /// Pages that the destination has not confirmed.
    pub fn left(&self) -> u64 {
        self.hot.len() + self.cold.len()
    }

    /// Whether the destination has not confirmed this page.
    pub fn keeps(&self, page: u64) -> bool {
        self.hot.contains(page) || self.cold.contains(page)
    }

    /// Pages that are on their way.
    pub fn on_way(&self) -> u64 {
        self.on_way.len()
    }

    /// All of them, in order.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut all = self.hot.clone();
        all.insert_all(&self.cold);
        all.runs().collect()
    }

    /// Whether a page stays in memory at the destination, by itself.
    pub fn is_hot(&self, page: u64) -> bool {
        self.hot.contains(page)
    }

    /// The guest waits for `page`. Whether it is to be sent: also when it was sent unasked, since that may be far behind, but not
    /// when it is ahead of whatever would be, or was confirmed. It is on its way now.
    pub fn requested(&mut self, page: u64) -> bool {
        let send = self.keeps(page) && !self.ahead.contains(page);
        if send {
            self.on_way.insert_range(page..page + 1);
            self.ahead.insert_range(page..page + 1);
        }
        send
    }

    /// What may go along with a page that the guest waits for: those in its block that are cold and not on their way. They are
    /// now. None when the page was confirmed.
    pub fn neighbours(&mut self, page: u64) -> Vec<Range<u64>> {
        if !self.keeps(page) {
            return Vec::new();
        }
        let block = page / BLOCK * BLOCK;
        let mut neighbours = Vec::new();
        for run in self.cold.runs_in(block..block + BLOCK) {
            neighbours.extend(self.on_way.gaps_in(run).flat_map(|gap| self.unreadable.gaps_in(gap)));
        }
        for run in &neighbours {
            self.on_way.insert_range(run.clone());
            self.ahead.insert_range(run.clone());
        }
        neighbours
    }

    /// A page that was to be sent and cannot be read. It is kept, and left alone until [`Outstanding::try_unreadable`].
    pub fn cannot_read(&mut self, page: u64) {
        self.not_sent(page..page + 1);
        if self.hot.contains(page) {
            // What is in memory can be read: it is not warm, and keeps no other waiting.
            self.hot.remove_range(page..page + 1);
            self.cold.insert_range(page..page + 1);
        }
        self.unreadable.insert_range(page..page + 1);
    }

    /// Pages that could not be read and are still kept.
    pub fn unreadable(&self) -> u64 {
        self.unreadable.len()
    }

    /// From here on they are tried as all others are.
    pub fn try_unreadable(&mut self) {
        self.unreadable.clear();
    }

    /// Neighbours that were not sent after all.
    pub fn not_sent(&mut self, pages: Range<u64>) {
        self.on_way.remove_range(pages.clone());
        self.ahead.remove_range(pages);
    }

    /// The next pages to send unasked: at most `most`, none that is on its way. They are now.
    pub fn next(&mut self, most: u64) -> Vec<Range<u64>> {
        let lane = if self.hot.is_empty() { &self.cold } else { &self.hot };
        let mut found = Vec::new();
        let mut room = most;
        let mut from = 0;
        while room > 0 {
            let Some(run) = lane.next_run(from, AT_A_TIME) else { break };
            from = run.end;
            for gap in self.on_way.gaps_in(run).flat_map(|gap| self.unreadable.gaps_in(gap)) {
                let end = gap.end.min(gap.start + room);
                room -= end - gap.start;
                if gap.start < end {
                    found.push(gap.start..end);
                }
            }
        }
        found.iter().for_each(|run| self.on_way.insert_range(run.clone()));
        found
    }

    /// The destination has these. Returns those that were still kept, which can be given back to the host.
    pub fn confirmed(&mut self, pages: Range<u64>) -> Vec<Range<u64>> {
        let kept = self.hot.runs_in(pages.clone()).chain(self.cold.runs_in(pages.clone())).collect();
        self.hot.remove_range(pages.clone());
        self.cold.remove_range(pages.clone());
        self.on_way.remove_range(pages.clone());
        self.unreadable.remove_range(pages);
        kept
    }

    /// The connection has broken. Returns what was on its way.
    pub fn cut(&mut self) -> Vec<Range<u64>> {
        let lost = self.on_way.runs().collect();
        self.on_way.clear();
        self.ahead.clear();
        lost
    }

    /// On a new connection the destination says what it misses: all else it has. Returns what can be given back.
    ///
    /// # Errors
    /// The first page that it misses and that is not here: it was confirmed once.
    pub fn resumed(&mut self, missing: &PageSet) -> Result<Vec<Range<u64>>, u64> {
        let mut gone = missing.clone();
        gone.remove_all(&self.hot);
        gone.remove_all(&self.cold);
        if let Some(run) = gone.next_run(0, 1) {
            return Err(run.start);
        }
        let mut confirmed = self.hot.clone();
        confirmed.insert_all(&self.cold);
        confirmed.remove_all(missing);
        let confirmed: Vec<_> = confirmed.runs().collect();
        Ok(confirmed.into_iter().flat_map(|run| self.confirmed(run)).collect())
    }
}

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
    pub fn later(&mut self, pages: Range<u64>) {
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
    pub fn requested_pages(&self) -> Vec<Range<u64>> {
        self.requested.runs().collect()
    }

    /// All pages that have not landed, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.missing.runs()
    }

    /// The guest has touched a page that is not mapped.
    pub fn fault(&mut self, page: u64) -> Fault {
        if self.landing.contains(page) {
            self.requested.insert_range(page..page + 1);
            Fault::Wait
        } else if self.landed.contains(page) {
            Fault::Wake
        } else if !self.missing.contains(page) {
            Fault::Fill
        } else if self.requested.contains(page) {
            Fault::Wait
        } else {
            self.requested.insert_range(page..page + 1);
            Fault::Ask
        }
    }

    /// A page has arrived. Whether it is to land: once, and never over what the guest has written since.
    pub fn arrived(&mut self, page: u64) -> bool {
        let is_missing = self.missing.contains(page);
        if is_missing {
            self.missing.remove_range(page..page + 1);
            self.landing.insert_range(page..page + 1);
        }
        is_missing
    }

    /// These could not land: they are missing again.
    pub fn failed(&mut self, pages: Range<u64>) {
        self.landing.remove_range(pages.clone());
        self.missing.insert_range(pages);
    }

    /// These have landed; whether the guest waits for any of them.
    pub fn landed(&mut self, pages: Range<u64>) -> bool {
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
    pub fn take_unconfirmed(&mut self) -> Vec<Range<u64>> {
        let runs = self.unconfirmed.runs().collect();
        self.unconfirmed.clear();
        runs
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use memory_agent::PageRange;
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 120;

    #[derive(Clone, Debug)]
    enum Event {
        /// The guest touches a page; whether it writes it, once it can.
        Touch(u64, bool),
        SendUnasked(u64),
        /// The next thing on the fault channel, or on the bulk channel, arrives.
        Deliver(bool),
        /// What has begun to land is whole, but for every so many-th page, if any fails: the connection is given up then.
        Land(Option<usize>),
        Confirm,
        Cut,
        /// So many pages that are next cannot be read for now.
        Unreadable(u64),
        TryUnreadable,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (0..PAGES, any::<bool>()).prop_map(|(page, writes)| Event::Touch(page, writes)),
            3 => (1u64..20).prop_map(Event::SendUnasked),
            6 => any::<bool>().prop_map(Event::Deliver),
            4 => prop::option::weighted(0.2, 1usize..5).prop_map(Event::Land),
            3 => Just(Event::Confirm),
            1 => Just(Event::Cut),
            1 => (1u64..5).prop_map(Event::Unreadable),
            1 => Just(Event::TryUnreadable),
        ]
    }

    /// Both sides and the channels between them. A page's content is a number; 0 is a hole.
    struct World {
        outstanding: Outstanding,
        missing: Missing,
        source: [Option<u64>; PAGES as usize],
        here: [Option<u64>; PAGES as usize],
        /// What each page must read as.
        truth: [u64; PAGES as usize],
        channels: [VecDeque<(u64, u64)>; 2],
        landing: Vec<(u64, u64)>,
        confirmations: VecDeque<Range<u64>>,
    }

    impl World {
        fn send(&mut self, channel: usize, runs: &[Range<u64>]) {
            for page in runs.iter().cloned().flatten() {
                let content = self.source[page as usize].expect("a page is given back after it was confirmed");
                self.channels[channel].push_back((page, content));
            }
        }

        fn ask(&mut self, page: u64) {
            if self.outstanding.requested(page) {
                self.send(0, &[page..page + 1]);
            }
            let neighbours = self.outstanding.neighbours(page);
            // Something else is wanted before all have gone.
            let (sent, dropped) = neighbours.split_at(neighbours.len() / 2);
            self.send(0, sent);
            dropped.iter().for_each(|run| self.outstanding.not_sent(run.clone()));
        }

        fn give_back(&mut self, runs: Vec<Range<u64>>) {
            for page in runs.into_iter().flatten() {
                assert!(self.here[page as usize].is_some(), "page {page} is given back and is not here");
                assert!(self.source[page as usize].take().is_some(), "page {page} is given back twice");
            }
        }

        fn deliver(&mut self, channel: usize) {
            if let Some((page, content)) = self.channels[channel].pop_front()
                && self.missing.arrived(page)
            {
                assert!(self.here[page as usize].is_none(), "page {page} lands twice");
                self.landing.push((page, content));
            }
        }

        fn land(&mut self) {
            for (page, content) in std::mem::take(&mut self.landing) {
                self.here[page as usize] = Some(content);
                self.missing.landed(page..page + 1);
            }
        }

        fn land_but(&mut self, nth: usize) {
            let landing = std::mem::take(&mut self.landing);
            let (fails, lands): (Vec<_>, Vec<_>) = landing.into_iter().enumerate().partition(|(i, _)| i % nth == 0);
            self.landing = lands.into_iter().map(|(_, page)| page).collect();
            self.land();
            if !fails.is_empty() {
                fails.into_iter().for_each(|(_, (page, _))| self.missing.failed(page..page + 1));
                self.cut();
            }
        }

        fn confirm(&mut self) {
            self.confirmations.extend(self.missing.take_unconfirmed());
            while let Some(run) = self.confirmations.pop_front() {
                let back = self.outstanding.confirmed(run);
                self.give_back(back);
            }
        }

        fn cut(&mut self) {
            self.channels.iter_mut().for_each(VecDeque::clear);
            self.confirmations.clear();
            self.outstanding.cut();
            // What is landing lands before the new connection is used.
            self.land();
            let mut missing = PageSet::new(PAGES);
            self.missing.ranges().for_each(|run| missing.insert_range(run));
            self.missing.take_unconfirmed();
            let back = self.outstanding.resumed(&missing).expect("nothing that is missing was given back");
            self.give_back(back);
            for page in self.missing.requested_pages().into_iter().flatten() {
                self.ask(page);
            }
        }

        fn touch(&mut self, page: u64, writes: bool) {
            if self.here[page as usize].is_none() {
                match self.missing.fault(page) {
                    Fault::Ask => return self.ask(page),
                    Fault::Wait => return,
                    Fault::Wake => panic!("page {page} has landed and is not here"),
                    Fault::Fill => self.here[page as usize] = Some(0),
                }
            }
            assert_eq!(self.here[page as usize], Some(self.truth[page as usize]), "page {page}");
            if writes {
                self.truth[page as usize] += 1000;
                self.here[page as usize] = Some(self.truth[page as usize]);
            }
        }
    }

    proptest! {
        /// Whatever the guest touches and writes, whatever is asked for and sent unasked, in whatever order it arrives, lands and
        /// is confirmed, and wherever the connection is cut: the guest never sees anything but its own memory, the source
        /// gives back only what has landed, and in the end it has nothing left.
        #[test]
        fn nothing_is_lost_and_nothing_is_overwritten(
            kinds in prop::collection::vec(0..4u8, PAGES as usize),
            events in prop::collection::vec(event(), 0..200),
        ) {
            let (mut hot, mut cold) = (PageSet::new(PAGES), PageSet::new(PAGES));
            let mut world = World {
                outstanding: Outstanding::new(hot.clone(), cold.clone()),
                missing: Missing::new(PAGES),
                source: [None; PAGES as usize],
                here: [None; PAGES as usize],
                truth: [0; PAGES as usize],
                channels: Default::default(),
                landing: Vec::new(),
                confirmations: VecDeque::new(),
            };
            for (page, kind) in (0..PAGES).zip(kinds) {
                let i = page as usize;
                world.truth[i] = if kind == 0 { 0 } else { page + 1 };
                match kind {
                    // A hole; sent by pre-copy; left over, warm and cold.
                    0 => {}
                    1 => world.here[i] = Some(page + 1),
                    _ => {
                        if kind == 2 { &mut hot } else { &mut cold }.insert_range(page..page + 1);
                        world.missing.later(page..page + 1);
                        world.source[i] = Some(page + 1);
                    }
                }
            }
            world.outstanding = Outstanding::new(hot, cold);
            for event in events {
                match event {
                    Event::Touch(page, writes) => world.touch(page, writes),
                    Event::SendUnasked(most) => {
                        let runs = world.outstanding.next(most);
                        prop_assert!(runs.iter().map(|r| r.page_count()).sum::<u64>() <= most);
                        world.send(1, &runs);
                    }
                    Event::Deliver(faults) => world.deliver(usize::from(!faults)),
                    Event::Land(None) => world.land(),
                    Event::Land(Some(nth)) => world.land_but(nth),
                    Event::Confirm => world.confirm(),
                    Event::Cut => world.cut(),
                    Event::Unreadable(most) => {
                        let left = world.outstanding.left();
                        world.outstanding.next(most).into_iter().flatten().for_each(|page| world.outstanding.cannot_read(page));
                        prop_assert_eq!(world.outstanding.left(), left);
                    }
                    Event::TryUnreadable => world.outstanding.try_unreadable(),
                }
                prop_assert!(world.outstanding.left() >= world.missing.left());
            }
            world.outstanding.try_unreadable();
            let mut rounds = 0;
            while world.outstanding.left() > 0 {
                let runs = world.outstanding.next(7);
                world.send(1, &runs);
                while !world.channels.iter().all(VecDeque::is_empty) {
                    world.deliver(0);
                    world.deliver(1);
                }
                world.land();
                world.confirm();
                rounds += 1;
                prop_assert!(rounds <= PAGES, "it does not end");
            }
            prop_assert_eq!((world.missing.left(), world.missing.requested()), (0, 0));
            prop_assert!(world.source.iter().all(Option::is_none));
            for page in 0..PAGES {
                world.touch(page, false);
            }
        }
    }
}
