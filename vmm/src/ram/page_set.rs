//! A set of RAM pages: one bit a page.

use std::ops::Range;

use memory_agent::{PageNumber, PageRange};

use super::RamPage;

/// A set of pages out of `0..pages`. Whoever asks about a range pays for that range, and whoever goes through the set for the
/// part of it that has pages in it, not for all of guest RAM.
#[derive(Clone)]
pub struct PageSet {
    words: Vec<u64>,
    /// The words from the first to the last that has a bit set.
    occupied: Range<usize>,
    pages: u64,
    len: u64,
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageSet({} of {} pages)", self.len, self.pages)
    }
}

impl PageSet {
    /// The empty set over `0..pages`.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], occupied: 0..0, pages, len: 0 }
    }

    /// The set of all of `0..pages`.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        set.insert_range(RamPage(0).run(pages));
        set
    }

    /// Number of pages the set is over.
    pub fn universe(&self) -> u64 {
        self.pages
    }

    /// Number of pages in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: RamPage) -> bool {
        let page = page.number();
        page < self.pages && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// Adds the pages of `range`; what lies outside the universe is left out.
    pub fn insert_range(&mut self, range: Range<RamPage>) {
        let range = self.within(range);
        if range.is_empty() {
            return;
        }
        for (index, mask) in pieces(range.clone()) {
            self.len += u64::from((mask & !self.words[index]).count_ones());
            self.words[index] |= mask;
        }
        self.occupy((range.start / 64) as usize..range.end.div_ceil(64) as usize);
    }

    /// Removes the pages of `range`.
    pub fn remove_range(&mut self, range: Range<RamPage>) {
        let range = self.clipped(range.numbers());
        for (index, mask) in pieces(range) {
            self.len -= u64::from((mask & self.words[index]).count_ones());
            self.words[index] &= !mask;
        }
        self.trim();
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.words[self.occupied.clone()].fill(0);
        self.occupied = 0..0;
        self.len = 0;
    }

    /// Adds every page of `other`, which is over the same universe.
    pub fn insert_all(&mut self, other: &Self) {
        debug_assert_eq!(self.pages, other.pages);
        self.insert_words(RamPage(other.occupied.start as u64 * 64), &other.words[other.occupied.clone()]);
    }

    /// Removes every page of `other`.
    pub fn remove_all(&mut self, other: &Self) {
        let common = self.occupied.start.max(other.occupied.start)..self.occupied.end.min(other.occupied.end);
        for index in common {
            self.len -= u64::from((self.words[index] & other.words[index]).count_ones());
            self.words[index] &= !other.words[index];
        }
        self.trim();
    }

    /// Adds the pages whose bits are set in `words`, the first bit being page `first`, which is a multiple of 64.
    /// Bits behind the universe are left out.
    pub fn insert_words(&mut self, first: RamPage, words: &[u64]) {
        let first = first.number();
        debug_assert_eq!(first % 64, 0);
        for (i, &word) in words.iter().enumerate() {
            let index = (first / 64) as usize + i;
            let Some(mine) = self.words.get_mut(index) else { break };
            let left = self.pages - index as u64 * 64;
            let word = if left < 64 { word & ((1 << left) - 1) } else { word };
            self.len += u64::from((word & !*mine).count_ones());
            *mine |= word;
            if word != 0 {
                self.occupy(index..index + 1);
            }
        }
    }

    /// The first run of pages in the set at or behind `from`, at most `max` long. Nothing behind its end is looked at.
    pub fn next_run(&self, from: RamPage, max: u64) -> Option<Range<RamPage>> {
        let start = self.scan(from.number()..self.pages, true).filter(|_| max > 0)?;
        let most = start.saturating_add(max).min(self.pages);
        Some(RamPage::range(start..self.scan(start..most, false).unwrap_or(most)))
    }

    /// The runs of pages in the set, in order, each as long as can be.
    pub fn runs(&self) -> impl Iterator<Item = Range<RamPage>> + '_ {
        self.runs_in(RamPage(0).run(self.pages))
    }

    /// The runs of pages of `range` that are in the set, in order, each as long as can be within it. Nothing outside it is
    /// looked at.
    pub fn runs_in(&self, range: Range<RamPage>) -> impl Iterator<Item = Range<RamPage>> + '_ {
        let Range { start: mut from, end } = self.within(range);
        std::iter::from_fn(move || {
            let start = self.scan(from..end, true)?;
            from = self.scan(start..end, false).unwrap_or(end);
            Some(RamPage::range(start..from))
        })
    }

    /// The runs of pages of `range` that are not in the set, in order, each as long as can be within it.
    pub fn gaps_in(&self, range: Range<RamPage>) -> impl Iterator<Item = Range<RamPage>> + '_ {
        let Range { start: mut from, end } = self.within(range);
        std::iter::from_fn(move || {
            let start = self.scan(from..end, false)?;
            from = self.scan(start..end, true).unwrap_or(end);
            Some(RamPage::range(start..from))
        })
    }

    /// Number of pages of `range` that are in the set.
    pub fn count_in(&self, range: Range<RamPage>) -> u64 {
        pieces(self.clipped(range.numbers()))
            .map(|(index, mask)| u64::from((self.words[index] & mask).count_ones()))
            .sum()
    }

    /// The first page of `range`, which ends within the universe, whose bit is `value`.
    fn scan(&self, range: Range<u64>, value: bool) -> Option<u64> {
        if value {
            let range = self.clipped(range);
            first_page(pieces(range), |index| self.words[index])
        } else {
            first_page(pieces(range), |index| !self.words[index])
        }
    }

    /// The part of a range that is in the universe.
    fn within(&self, range: Range<RamPage>) -> Range<u64> {
        range.start.number()..range.end.number().min(self.pages)
    }

    /// The part of a range that can have pages of the set in it.
    fn clipped(&self, range: Range<u64>) -> Range<u64> {
        range.start.max(self.occupied.start as u64 * 64)..range.end.min(self.occupied.end as u64 * 64)
    }

    /// These words have bits set.
    fn occupy(&mut self, words: Range<usize>) {
        let Range { start, end } = self.occupied;
        self.occupied = if start < end { start.min(words.start)..end.max(words.end) } else { words };
    }

    /// Bits have been cleared: finds the first and the last word again that has one.
    fn trim(&mut self) {
        if self.len == 0 {
            self.occupied = 0..0;
            return;
        }
        let has_none = |index: &usize| {
            work::count();
            self.words[*index] == 0
        };
        let in_front = self.occupied.clone().take_while(has_none).count();
        let behind = self.occupied.clone().rev().take_while(has_none).count();
        self.occupied = self.occupied.start + in_front..self.occupied.end - behind;
    }
}

impl PartialEq for PageSet {
    fn eq(&self, other: &Self) -> bool {
        (self.pages, self.len) == (other.pages, other.len) && self.words == other.words
    }
}

impl Eq for PageSet {}

/// The first bit of these pieces that is set in its word.
fn first_page(mut pieces: impl Iterator<Item = (usize, u64)>, word: impl Fn(usize) -> u64) -> Option<u64> {
    pieces.find_map(|(index, mask)| {
        let found = word(index) & mask;
        (found != 0).then(|| index as u64 * 64 + u64::from(found.trailing_zeros()))
    })
}

/// A range as word indices and masks.
fn pieces(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = if range.is_empty() { 0..0 } else { range.start / 64..range.end.div_ceil(64) };
    words.map(move |index| {
        work::count();
        let low = range.start.saturating_sub(index * 64);
        let high = (range.end - index * 64).min(64);
        let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
        (index as usize, mask)
    })
}

/// How many words are looked at, for tests: what a question costs, whatever the machine.
mod work {
    #[cfg(test)]
    thread_local!(pub(super) static WORDS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });

    #[inline]
    pub(super) fn count() {
        #[cfg(test)]
        WORDS.set(WORDS.get() + 1);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The pages of runs, as numbers.
    fn numbers(runs: impl IntoIterator<Item = Range<RamPage>>) -> impl Iterator<Item = u64> {
        runs.into_iter().flat_map(|run| run.numbers())
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Range<u64>),
        Remove(Range<u64>),
        Words(u64, Vec<u64>),
        Clear,
    }

    fn steps() -> impl Strategy<Value = (u64, Vec<Step>)> {
        (1u64..400).prop_flat_map(|pages| {
            let range = (0..pages + 20, 0..pages + 20).prop_map(|(a, b)| a.min(b)..a.max(b));
            let step = prop_oneof![
                4 => range.clone().prop_map(Step::Insert),
                3 => range.prop_map(Step::Remove),
                2 => (0..pages.div_ceil(64), prop::collection::vec(any::<u64>(), 0..8))
                    .prop_map(|(word, words)| Step::Words(word * 64, words)),
                1 => Just(Step::Clear),
            ];
            (Just(pages), prop::collection::vec(step, 0..40))
        })
    }

    fn apply(step: Step, set: &mut PageSet, naive: &mut BTreeSet<u64>) {
        let pages = set.universe();
        match step {
            Step::Insert(r) => {
                set.insert_range(RamPage::range(r.clone()));
                naive.extend(r.filter(|p| *p < pages));
            }
            Step::Remove(r) => {
                set.remove_range(RamPage::range(r.clone()));
                naive.retain(|p| !r.contains(p));
            }
            Step::Words(first, words) => {
                set.insert_words(RamPage(first), &words);
                for (i, word) in words.iter().enumerate() {
                    let pages_of_word = (0..64).filter(|b| word >> b & 1 == 1).map(|b| first + i as u64 * 64 + b);
                    naive.extend(pages_of_word.filter(|p| *p < pages));
                }
            }
            Step::Clear => {
                set.clear();
                naive.clear();
            }
        }
    }

    fn after(pages: u64, steps: Vec<Step>) -> (PageSet, BTreeSet<u64>) {
        let (mut set, mut naive) = (PageSet::new(pages), BTreeSet::new());
        steps.into_iter().for_each(|step| apply(step, &mut set, &mut naive));
        (set, naive)
    }

    proptest! {
        #[test]
        fn it_is_a_set((pages, steps) in steps()) {
            let (mut set, mut naive) = (PageSet::new(pages), BTreeSet::new());
            for step in steps {
                apply(step, &mut set, &mut naive);
                prop_assert_eq!(set.len(), naive.len() as u64);
                let flat: Vec<u64> = numbers(set.runs()).collect();
                prop_assert_eq!(&flat, &naive.iter().copied().collect::<Vec<_>>());
                for run in set.runs() {
                    prop_assert!(!set.contains(run.end));
                    prop_assert_eq!(set.count_in(run.clone()), run.page_count());
                }
            }
        }

        /// The same answers as a set of numbers gives, and words are looked at only where the answer can be.
        #[test]
        fn a_question_is_answered_where_it_was_asked(
            (pages, steps) in steps(),
            from in 0..420_u64,
            length in 0..420_u64,
        ) {
            let (set, naive) = after(pages, steps);
            let range = RamPage(from).run(length);
            let inside = |page: &u64| range.contains(&RamPage(*page)) && *page < pages;
            let flat: Vec<u64> = numbers(set.runs_in(range.clone())).collect();
            prop_assert_eq!(&flat, &naive.iter().copied().filter(inside).collect::<Vec<_>>());
            let gaps: Vec<u64> = numbers(set.gaps_in(range.clone())).collect();
            prop_assert_eq!(gaps, (0..pages).filter(|page| inside(page) && !naive.contains(page)).collect::<Vec<_>>());
            prop_assert_eq!(set.count_in(range.clone()), flat.len() as u64);
            let first = naive.range(from..).next().filter(|_| length > 0);
            let expected = first.map(|first| {
                let end = (*first..first + length).find(|page| !naive.contains(page)).unwrap_or(first + length);
                RamPage::range(*first..end)
            });
            prop_assert_eq!(set.next_run(RamPage(from), length), expected);
        }

        #[test]
        fn sets_are_joined_and_taken_apart((pages, left) in steps(), right in prop::collection::vec((0..400_u64, 0..90_u64), 0..8)) {
            let (set, naive) = after(pages, left);
            let right = right.into_iter().map(|(start, length)| Step::Insert(start..start + length)).collect();
            let (other, other_naive) = after(pages, right);
            let (mut both, mut rest) = (set.clone(), set.clone());
            both.insert_all(&other);
            rest.remove_all(&other);
            prop_assert_eq!(numbers(both.runs()).collect::<BTreeSet<_>>(), naive.union(&other_naive).copied().collect());
            prop_assert_eq!(numbers(rest.runs()).collect::<BTreeSet<_>>(), naive.difference(&other_naive).copied().collect());
            prop_assert_eq!(both.len() - rest.len(), other.len());
        }
    }

    /// How many words `ask` looks at.
    fn words_for<T>(ask: impl FnOnce() -> T) -> u64 {
        let before = work::WORDS.get();
        ask();
        work::WORDS.get() - before
    }

    /// A guest of 1 TiB.
    const LARGE: u64 = 1 << 28;

    #[test]
    fn a_question_about_a_few_pages_of_a_large_guest_looks_at_a_few_words() {
        let (full, empty) = (PageSet::full(LARGE), PageSet::new(LARGE));
        let mut ends = PageSet::new(LARGE);
        ends.insert_range(RamPage(0).run(1));
        ends.insert_range(RamPage(LARGE - 1).run(1));
        for set in [&full, &empty, &ends] {
            assert!(words_for(|| set.runs_in(RamPage(64).run(128)).count()) <= 8, "{set:?}");
            assert!(words_for(|| set.gaps_in(RamPage(64).run(128)).count()) <= 8, "{set:?}");
            assert!(words_for(|| set.count_in(RamPage(64).run(128))) <= 2, "{set:?}");
        }
        assert!(words_for(|| full.next_run(RamPage(7), 16)) <= 2);
        assert!(words_for(|| empty.next_run(RamPage(7), 16)) == 0);
    }

    #[test]
    fn emptying_a_large_set_from_the_front_looks_at_each_word_a_few_times() {
        const SPARSE: u64 = 1 << 20;
        let mut set = PageSet::new(SPARSE);
        (0..SPARSE).step_by(4096).for_each(|page| set.insert_range(RamPage(page).run(3)));
        let words = words_for(|| {
            while let Some(run) = set.next_run(RamPage(0), 2) {
                set.remove_range(run);
            }
        });
        assert!(words < SPARSE / 64 * 4, "{words} words of {}", SPARSE / 64);
        set.insert_range(RamPage(SPARSE / 2).run(100));
        assert!(words_for(|| (set.runs().count(), set.clear())) < 8);
    }
}
