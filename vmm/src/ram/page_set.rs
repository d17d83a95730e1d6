//! A set of RAM pages: one bit a page.

use std::ops::Range;

/// A set of pages out of `0..pages`.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
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
        Self { words: vec![0; pages.div_ceil(64) as usize], pages, len: 0 }
    }

    /// The set of all of `0..pages`.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        set.insert_range(0..pages);
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
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// Adds the pages of `range`; what lies outside the universe is left out.
    pub fn insert_range(&mut self, range: Range<u64>) {
        self.apply(range, |word, mask| word | mask);
    }

    /// Removes the pages of `range`.
    pub fn remove_range(&mut self, range: Range<u64>) {
        self.apply(range, |word, mask| word & !mask);
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.len = 0;
    }

    /// Adds every page of `other`, which is over the same universe.
    pub fn insert_all(&mut self, other: &Self) {
        debug_assert_eq!(self.pages, other.pages);
        self.insert_words(0, &other.words);
    }

    /// Removes every page of `other`.
    pub fn remove_all(&mut self, other: &Self) {
        let mut len = 0;
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
            len += u64::from(mine.count_ones());
        }
        self.len = len;
    }

    /// Adds the pages whose bits are set in `words`, the first bit being page `first`, which is a multiple of 64.
    /// Bits behind the universe are left out.
    pub fn insert_words(&mut self, first: u64, words: &[u64]) {
        debug_assert_eq!(first % 64, 0);
        for (i, &word) in words.iter().enumerate() {
            let index = (first / 64) as usize + i;
            let Some(mine) = self.words.get_mut(index) else { break };
            let left = self.pages - index as u64 * 64;
            let word = if left < 64 { word & ((1 << left) - 1) } else { word };
            self.len += u64::from((word & !*mine).count_ones());
            *mine |= word;
        }
    }

    /// The first run of pages in the set at or behind `from`, at most `max` long.
    pub fn next_run(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let start = self.scan(from, true)?;
        let end = self.scan(start, false).unwrap_or(self.pages).min(start.saturating_add(max));
        Some(start..end)
    }

    /// The runs of pages in the set, in order, each as long as can be.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from, u64::MAX)?;
            from = run.end;
            Some(run)
        })
    }

    /// Number of pages of `range` that are in the set.
    pub fn count_in(&self, range: Range<u64>) -> u64 {
        Self::pieces(range.start..range.end.min(self.pages))
            .map(|(index, mask)| u64::from((self.words[index] & mask).count_ones()))
            .sum()
    }

    /// First page at or behind `from` whose bit is `value`.
    fn scan(&self, from: u64, value: bool) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let flip = if value { 0 } else { u64::MAX };
        let mut index = (from / 64) as usize;
        let mut word = (self.words[index] ^ flip) & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                let page = index as u64 * 64 + u64::from(word.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            index += 1;
            word = *self.words.get(index)? ^ flip;
        }
    }

    fn apply(&mut self, range: Range<u64>, change: impl Fn(u64, u64) -> u64) {
        for (index, mask) in Self::pieces(range.start..range.end.min(self.pages)) {
            let old = self.words[index];
            let new = change(old, mask);
            self.len = self.len + u64::from(new.count_ones()) - u64::from(old.count_ones());
            self.words[index] = new;
        }
    }

    /// A range as word indices and masks.
    fn pieces(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
        let words = if range.is_empty() { 0..0 } else { range.start / 64..range.end.div_ceil(64) };
        words.map(move |index| {
            let low = range.start.saturating_sub(index * 64);
            let high = (range.end - index * 64).min(64);
            let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
            (index as usize, mask)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

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

    proptest! {
        #[test]
        fn it_is_a_set((pages, steps) in steps()) {
            let mut set = PageSet::new(pages);
            let mut naive = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Insert(r) => { set.insert_range(r.clone()); naive.extend(r.filter(|p| *p < pages)); }
                    Step::Remove(r) => { set.remove_range(r.clone()); naive.retain(|p| !r.contains(p)); }
                    Step::Words(first, words) => {
                        set.insert_words(first, &words);
                        for (i, word) in words.iter().enumerate() {
                            naive.extend((0..64).filter(|b| word >> b & 1 == 1).map(|b| first + i as u64 * 64 + b).filter(|p| *p < pages));
                        }
                    }
                    Step::Clear => { set.clear(); naive.clear(); }
                }
                prop_assert_eq!(set.len(), naive.len() as u64);
                let flat: Vec<u64> = set.runs().flatten().collect();
                prop_assert_eq!(&flat, &naive.iter().copied().collect::<Vec<_>>());
                for run in set.runs() {
                    prop_assert!(!set.contains(run.end));
                    prop_assert_eq!(set.count_in(run.clone()), run.end - run.start);
                }
            }
        }
    }
}
