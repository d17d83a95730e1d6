//! What is still to come once the guest runs at the destination. Pure, like the plan of pre-copy: no I/O, no clock.
//!
//! The source keeps a page until the destination has confirmed it ([`Outstanding`]); the destination lets nobody see a page
//! before it has landed, and lands each once ([`Missing`]). A connection that breaks loses what was on its way, and nothing
//! else.

mod missing;
mod outstanding;

pub use missing::{Fault, Missing};
pub use outstanding::{BLOCK, Outstanding};

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use memory_agent::{PageNumber, PageRange};
    use proptest::prelude::*;

    use std::ops::Range;

    use super::*;
    use crate::ram::{PageSet, RamPage};

    const PAGES: u64 = 120;

    #[derive(Clone, Debug)]
    enum Event {
        /// The guest touches a page; whether it writes it, once it can.
        Touch(RamPage, bool),
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
            4 => (0..PAGES, any::<bool>()).prop_map(|(page, writes)| Event::Touch(RamPage(page), writes)),
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
        channels: [VecDeque<(RamPage, u64)>; 2],
        landing: Vec<(RamPage, u64)>,
        confirmations: VecDeque<Range<RamPage>>,
    }

    impl World {
        fn send(&mut self, channel: usize, runs: &[Range<RamPage>]) {
            for page in runs.iter().flat_map(PageRange::pages) {
                let content = self.source[page.number() as usize].expect("a page is given back after it was confirmed");
                self.channels[channel].push_back((page, content));
            }
        }

        fn ask(&mut self, page: RamPage) {
            if self.outstanding.requested(page) {
                self.send(0, &[page.run(1)]);
            }
            let neighbours = self.outstanding.neighbours(page);
            // Something else is wanted before all have gone.
            let (sent, dropped) = neighbours.split_at(neighbours.len() / 2);
            self.send(0, sent);
            dropped.iter().for_each(|run| self.outstanding.not_sent(run.clone()));
        }

        fn give_back(&mut self, runs: Vec<Range<RamPage>>) {
            for page in runs.into_iter().flat_map(|run| run.pages()) {
                assert!(self.here[page.number() as usize].is_some(), "page {page} is given back and is not here");
                assert!(self.source[page.number() as usize].take().is_some(), "page {page} is given back twice");
            }
        }

        fn deliver(&mut self, channel: usize) {
            if let Some((page, content)) = self.channels[channel].pop_front()
                && self.missing.arrived(page)
            {
                assert!(self.here[page.number() as usize].is_none(), "page {page} lands twice");
                self.landing.push((page, content));
            }
        }

        fn land(&mut self) {
            for (page, content) in std::mem::take(&mut self.landing) {
                self.here[page.number() as usize] = Some(content);
                self.missing.landed(page.run(1));
            }
        }

        fn land_but(&mut self, nth: usize) {
            let landing = std::mem::take(&mut self.landing);
            let (fails, lands): (Vec<_>, Vec<_>) = landing.into_iter().enumerate().partition(|(i, _)| i % nth == 0);
            self.landing = lands.into_iter().map(|(_, page)| page).collect();
            self.land();
            if !fails.is_empty() {
                fails.into_iter().for_each(|(_, (page, _))| self.missing.failed(page.run(1)));
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
            for page in self.missing.requested_pages().into_iter().flat_map(|run| run.pages()) {
                self.ask(page);
            }
        }

        fn touch(&mut self, page: RamPage, writes: bool) {
            if self.here[page.number() as usize].is_none() {
                match self.missing.fault(page) {
                    Fault::Ask => return self.ask(page),
                    Fault::Wait => return,
                    Fault::Wake => panic!("page {page} has landed and is not here"),
                    Fault::Fill => self.here[page.number() as usize] = Some(0),
                }
            }
            assert_eq!(self.here[page.number() as usize], Some(self.truth[page.number() as usize]), "page {page}");
            if writes {
                self.truth[page.number() as usize] += 1000;
                self.here[page.number() as usize] = Some(self.truth[page.number() as usize]);
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
            for (i, kind) in kinds.into_iter().enumerate() {
                let (page, content) = (RamPage(i as u64), i as u64 + 1);
                world.truth[i] = if kind == 0 { 0 } else { content };
                match kind {
                    // A hole; sent by pre-copy; left over, warm and cold.
                    0 => {}
                    1 => world.here[i] = Some(content),
                    _ => {
                        if kind == 2 { &mut hot } else { &mut cold }.insert_range(page.run(1));
                        world.missing.later(page.run(1));
                        world.source[i] = Some(content);
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
                        world.outstanding.next(most).into_iter().flat_map(|run| run.pages()).for_each(|page| world.outstanding.cannot_read(page));
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
            for page in RamPage(0).run(PAGES).pages() {
                world.touch(page, false);
            }
        }
    }
}
