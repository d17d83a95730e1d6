//! Page numbers as ranges of addresses, so that a hole is one system call.

use std::ops::Range;

use super::PAGE;

/// The guest physical addresses of these page numbers, in order, each page once.
pub(super) fn of_page_numbers(mut numbers: Vec<u32>) -> Vec<Range<u64>> {
    numbers.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for start in numbers.into_iter().map(|number| u64::from(number) * PAGE) {
        match ranges.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(start + PAGE),
            _ => ranges.push(start..start + PAGE),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn they_hold_the_same_pages(numbers in prop::collection::vec(0..50_u32, 0..80)) {
            let naive: BTreeSet<u64> = numbers.iter().map(|number| u64::from(*number) * PAGE).collect();
            let ranges = of_page_numbers(numbers);
            prop_assert!(ranges.windows(2).all(|two| two[0].end < two[1].start));
            let pages: Vec<u64> = ranges.into_iter().flat_map(|range| range.step_by(PAGE as usize)).collect();
            prop_assert_eq!(pages, naive.into_iter().collect::<Vec<_>>());
        }
    }
}
