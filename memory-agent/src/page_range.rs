//! Ranges of pages, and sets of them.

use std::ops::{Deref, Range};

use crate::page_number::{Page, PageNumber};
use crate::page_state::PAGE_SIZE;

/// What is asked of a range of page numbers; a range whose end is before its start has no pages.
pub trait PageRange: Sized {
    /// How they are counted.
    type Page: PageNumber;

    /// How many pages it has.
    fn page_count(&self) -> u64;

    /// How many bytes these are.
    fn byte_count(&self) -> u64 {
        self.page_count().saturating_mul(PAGE_SIZE)
    }

    /// The pages of both; without pages, at the later start, when there are none.
    #[must_use]
    fn intersection(&self, other: &Self) -> Self;

    /// Each of the pages, in order.
    fn pages(&self) -> impl DoubleEndedIterator<Item = Self::Page> + use<Self>;

    /// The pages' numbers.
    fn numbers(&self) -> Range<u64>;

    /// The same pages counted in another way, in which page `from` is called `to`; those before it are left out.
    #[must_use]
    fn renumbered<Q: PageNumber>(&self, from: Self::Page, to: Q) -> Range<Q>;
}

impl<P: PageNumber> PageRange for Range<P> {
    type Page = P;

    fn page_count(&self) -> u64 {
        self.end.number().saturating_sub(self.start.number())
    }

    fn intersection(&self, other: &Self) -> Self {
        let start = self.start.max(other.start);
        start..self.end.min(other.end).max(start)
    }

    fn pages(&self) -> impl DoubleEndedIterator<Item = P> + use<P> {
        self.numbers().map(P::new)
    }

    fn numbers(&self) -> Range<u64> {
        self.start.number()..self.end.number()
    }

    fn renumbered<Q: PageNumber>(&self, from: P, to: Q) -> Range<Q> {
        let there = |page: P| to + page.number().saturating_sub(from.number());
        there(self.start)..there(self.end)
    }
}

/// A set of pages, as ranges in order, of which none is empty and no two touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageRanges<P = Page>(Vec<Range<P>>);

impl<P: PageNumber> PageRanges<P> {
    /// No pages.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The pages of ranges in any order, which may overlap.
    pub fn from_unordered(ranges: &[Range<P>]) -> Self {
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable_by_key(|range| range.start);
        sorted.into_iter().collect()
    }

    /// Adds a range; quickly, where none behind it is there yet.
    pub fn push(&mut self, range: Range<P>) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if range.start < last.start => {
                self.0.push(range);
                *self = Self::from_unordered(&self.0);
            }
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => self.0.push(range),
        }
    }

    /// How many pages there are.
    pub fn page_count(&self) -> u64 {
        self.0.iter().map(PageRange::page_count).sum()
    }

    /// The ranges.
    pub fn as_slice(&self) -> &[Range<P>] {
        &self.0
    }

    /// The pages of both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let (mut here, mut there) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut both = Self::new();
        while let (Some(a), Some(b)) = (here.peek(), there.peek()) {
            both.push(a.intersection(b));
            if a.end < b.end {
                here.next()
            } else {
                there.next()
            };
        }
        both
    }

    /// All but the last so many pages.
    #[must_use]
    pub fn without_last(&self, pages: u64) -> Self {
        let mut left = self.page_count().saturating_sub(pages);
        let mut kept = Self::new();
        for range in &self.0 {
            let length = left.min(range.page_count());
            kept.push(range.start..range.start + length);
            left -= length;
        }
        kept
    }

    /// The ranges, where those that at most so many pages are between are one, with the pages between.
    #[must_use]
    pub fn joined(&self, near: u64) -> Self {
        let mut spans: Vec<Range<P>> = Vec::new();
        for range in &self.0 {
            match spans.last_mut() {
                Some(span) if range.start - span.end <= near => span.end = range.end,
                _ => spans.push(range.clone()),
            }
        }
        Self(spans)
    }
}

impl<P: PageNumber> Deref for PageRanges<P> {
    type Target = [Range<P>];

    fn deref(&self) -> &[Range<P>] {
        &self.0
    }
}

impl<P: PageNumber> FromIterator<Range<P>> for PageRanges<P> {
    fn from_iter<I: IntoIterator<Item = Range<P>>>(ranges: I) -> Self {
        let mut set = Self::new();
        set.extend(ranges);
        set
    }
}

impl<P: PageNumber> Extend<Range<P>> for PageRanges<P> {
    fn extend<I: IntoIterator<Item = Range<P>>>(&mut self, ranges: I) {
        ranges.into_iter().for_each(|range| self.push(range));
    }
}

impl<P: PageNumber> IntoIterator for PageRanges<P> {
    type Item = Range<P>;
    type IntoIter = std::vec::IntoIter<Range<P>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, P: PageNumber> IntoIterator for &'a PageRanges<P> {
    type Item = &'a Range<P>;
    type IntoIter = std::slice::Iter<'a, Range<P>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        let range = (0..60_u64, 0..8_u64).prop_map(|(start, length)| start..start + length);
        prop::collection::vec(range, 0..12)
    }

    fn pages(set: &PageRanges) -> Vec<u64> {
        set.iter().cloned().flatten().collect()
    }

    #[test]
    fn a_range_counts_clips_and_moves() {
        assert_eq!(((3..7).page_count(), (3..7).byte_count()), (4, 4 * PAGE_SIZE));
        #[allow(clippy::reversed_empty_ranges, reason = "from somewhere else")]
        let reversed = 7..3;
        assert_eq!(reversed.page_count(), 0);
        assert_eq!((3..7).intersection(&(5..9)), 5..7);
        assert_eq!((3..7).intersection(&(8..9)), 8..8);
        assert_eq!((3..7).renumbered(0, 10), 13..17);
        assert_eq!((13..17).renumbered(15, 0), 0..2);
        assert_eq!((3..6).pages().rev().collect::<Vec<_>>(), [5, 4, 3]);
    }

    proptest! {
        #[test]
        fn a_set_has_the_pages_of_its_ranges(list in ranges()) {
            let set = PageRanges::from_unordered(&list);
            prop_assert!(set.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert!(set.iter().all(|range| !range.is_empty()));
            prop_assert_eq!(&list.iter().cloned().collect::<PageRanges>(), &set);
            let expected: Vec<u64> = (0..80).filter(|page| list.iter().any(|range| range.contains(page))).collect();
            prop_assert_eq!(set.page_count(), expected.len() as u64);
            prop_assert_eq!(pages(&set), expected);
        }

        #[test]
        fn sets_are_sets(a in ranges(), b in ranges(), last in 0..40_u64) {
            let (a, b) = (PageRanges::from_unordered(&a), PageRanges::from_unordered(&b));
            let both: Vec<_> = pages(&a).into_iter().filter(|page| pages(&b).contains(page)).collect();
            prop_assert_eq!(pages(&a.intersection(&b)), both);
            let all = pages(&a);
            prop_assert_eq!(pages(&a.without_last(last)), &all[..all.len().saturating_sub(last as usize)]);
        }

        #[test]
        fn what_is_near_is_joined(list in ranges(), near in 0..6_u64) {
            let set = PageRanges::from_unordered(&list);
            let joined = set.joined(near);
            prop_assert!(joined.windows(2).all(|pair| pair[1].start - pair[0].end > near));
            prop_assert_eq!(joined.intersection(&set), set.clone());
            prop_assert_eq!(joined.first().map(|range| range.start), set.first().map(|range| range.start));
            prop_assert_eq!(joined.last().map(|range| range.end), set.last().map(|range| range.end));
        }
    }
}
