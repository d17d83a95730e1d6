//! Pages outstanding: what the source has and the destination has not confirmed.

use std::ops::Range;

use crate::ram::{PageSet, RamPage};
use memory_agent::{PageNumber, PageRange};

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
    pub(in crate::migration::plan) fn new(hot: PageSet, cold: PageSet) -> Self {
        let none = PageSet::new(hot.universe());
        Self { hot, cold, on_way: none.clone(), ahead: none.clone(), unreadable: none }
    }

    /// Pages that the destination has not confirmed.
    pub fn left(&self) -> u64 {
        self.hot.len() + self.cold.len()
    }

    /// Whether the destination has not confirmed this page.
    pub fn keeps(&self, page: RamPage) -> bool {
        self.hot.contains(page) || self.cold.contains(page)
    }

    /// Pages that are on their way.
    pub fn on_way(&self) -> u64 {
        self.on_way.len()
    }

    /// All of them, in order.
    pub fn ranges(&self) -> Vec<Range<RamPage>> {
        let mut all = self.hot.clone();
        all.insert_all(&self.cold);
        all.runs().collect()
    }

    /// Whether a page stays in memory at the destination, by itself.
    pub fn is_hot(&self, page: RamPage) -> bool {
        self.hot.contains(page)
    }

    /// The guest waits for `page`. Whether it is to be sent: also when it was sent unasked, since that may be far behind, but not
    /// when it is ahead of whatever would be, or was confirmed. It is on its way now.
    pub fn requested(&mut self, page: RamPage) -> bool {
        let send = self.keeps(page) && !self.ahead.contains(page);
        if send {
            self.on_way.insert_range(page.run(1));
            self.ahead.insert_range(page.run(1));
        }
        send
    }

    /// What may go along with a page that the guest waits for: those in its block that are cold and not on their way. They are
    /// now. None when the page was confirmed.
    pub fn neighbours(&mut self, page: RamPage) -> Vec<Range<RamPage>> {
        if !self.keeps(page) {
            return Vec::new();
        }
        let block = RamPage(page.number() / BLOCK * BLOCK).run(BLOCK);
        let mut neighbours = Vec::new();
        for run in self.cold.runs_in(block) {
            neighbours.extend(self.on_way.gaps_in(run).flat_map(|gap| self.unreadable.gaps_in(gap)));
        }
        for run in &neighbours {
            self.on_way.insert_range(run.clone());
            self.ahead.insert_range(run.clone());
        }
        neighbours
    }

    /// A page that was to be sent and cannot be read. It is kept, and left alone until [`Outstanding::try_unreadable`].
    pub fn cannot_read(&mut self, page: RamPage) {
        self.not_sent(page.run(1));
        if self.hot.contains(page) {
            // What is in memory can be read: it is not warm, and keeps no other waiting.
            self.hot.remove_range(page.run(1));
            self.cold.insert_range(page.run(1));
        }
        self.unreadable.insert_range(page.run(1));
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
    pub fn not_sent(&mut self, pages: Range<RamPage>) {
        self.on_way.remove_range(pages.clone());
        self.ahead.remove_range(pages);
    }

    /// The next pages to send unasked: at most `most`, none that is on its way. They are now.
    pub fn next(&mut self, most: u64) -> Vec<Range<RamPage>> {
        let lane = if self.hot.is_empty() { &self.cold } else { &self.hot };
        let mut found = Vec::new();
        let mut room = most;
        let mut from = RamPage(0);
        while room > 0 {
            let Some(run) = lane.next_run(from, AT_A_TIME) else { break };
            from = run.end;
            for gap in self.on_way.gaps_in(run).flat_map(|gap| self.unreadable.gaps_in(gap)) {
                let some = gap.intersection(&gap.start.run(room));
                room -= some.page_count();
                if !some.is_empty() {
                    found.push(some);
                }
            }
        }
        found.iter().for_each(|run| self.on_way.insert_range(run.clone()));
        found
    }

    /// The destination has these. Returns those that were still kept, which can be given back to the host.
    pub fn confirmed(&mut self, pages: Range<RamPage>) -> Vec<Range<RamPage>> {
        let kept = self.hot.runs_in(pages.clone()).chain(self.cold.runs_in(pages.clone())).collect();
        self.hot.remove_range(pages.clone());
        self.cold.remove_range(pages.clone());
        self.on_way.remove_range(pages.clone());
        self.unreadable.remove_range(pages);
        kept
    }

    /// The connection has broken. Returns what was on its way.
    pub fn cut(&mut self) -> Vec<Range<RamPage>> {
        let lost = self.on_way.runs().collect();
        self.on_way.clear();
        self.ahead.clear();
        lost
    }

    /// On a new connection the destination says what it misses: all else it has. Returns what can be given back.
    ///
    /// # Errors
    /// The first page that it misses and that is not here: it was confirmed once.
    pub fn resumed(&mut self, missing: &PageSet) -> Result<Vec<Range<RamPage>>, RamPage> {
        let mut gone = missing.clone();
        gone.remove_all(&self.hot);
        gone.remove_all(&self.cold);
        if let Some(run) = gone.next_run(RamPage(0), 1) {
            return Err(run.start);
        }
        let mut confirmed = self.hot.clone();
        confirmed.insert_all(&self.cold);
        confirmed.remove_all(missing);
        let confirmed: Vec<_> = confirmed.runs().collect();
        Ok(confirmed.into_iter().flat_map(|run| self.confirmed(run)).collect())
    }
}
