use proptest::prelude::*;

use super::*;
use PageState::{Hole, Resident, Swapped};

const SIZE: u64 = CHUNK_PAGES as u64;

fn state() -> impl Strategy<Value = PageState> {
    prop_oneof![Just(Hole), Just(Resident), Just(Swapped)]
}

#[derive(Clone, Debug)]
enum Write {
    Range(Range<u64>, PageState),
    /// Every `step`th page of a range.
    Comb(Range<u64>, usize, PageState),
}

/// Writes short and long, and fragmented enough to go through all three forms of a chunk and back.
fn write(len: u64) -> impl Strategy<Value = Write> {
    let range = (0..len + 10, prop_oneof![0..40u64, 0..3000u64, 0..2 * SIZE]).prop_map(|(start, n)| start..start + n);
    prop_oneof![
        3 => (range.clone(), state()).prop_map(|(range, state)| Write::Range(range, state)),
        1 => (range, 2..5usize, state()).prop_map(|(range, step, state)| Write::Comb(range, step, state)),
    ]
}

/// A map and the same as a plain list.
fn maps() -> impl Strategy<Value = (Residency, Vec<PageState>)> {
    prop_oneof![1..200u64, 1..3 * SIZE].prop_flat_map(|len| {
        (state(), prop::collection::vec(write(len), 0..12)).prop_map(move |(initial, writes)| {
            let mut residency = Residency::uniform(len, initial);
            let mut plain = vec![initial; len as usize];
            let mut set = |range: Range<u64>, state| {
                residency.set(range.clone(), state);
                plain[range.start.min(len) as usize..range.end.min(len) as usize].fill(state);
            };
            for write in writes {
                match write {
                    Write::Range(range, state) => set(range, state),
                    Write::Comb(range, step, state) => range.step_by(step).for_each(|p| set(p..p + 1, state)),
                }
            }
            (residency, plain)
        })
    })
}

fn plain_counts(plain: &[PageState]) -> Counts {
    let mut counts = Counts::default();
    plain.iter().for_each(|&state| counts.count(state, 1));
    counts
}

fn plain_runs(plain: &[PageState]) -> Vec<Run> {
    let mut page = 0;
    let runs = plain.chunk_by(|a, b| a == b).map(|run| {
        let start = page;
        page += run.len() as u64;
        Run { pages: start..page, state: run[0] }
    });
    runs.collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn holds_what_was_set((residency, plain) in maps(), cut in any::<prop::sample::Index>(), to in any::<prop::sample::Index>()) {
        let len = plain.len();
        prop_assert_eq!(residency.len(), len as u64);
        for (page, state) in plain.iter().enumerate() {
            prop_assert_eq!(residency.get(page as u64), Some(*state));
        }
        prop_assert_eq!(residency.get(len as u64), None);
        prop_assert_eq!(residency.counts(), plain_counts(&plain));
        prop_assert!(residency.runs().eq(plain_runs(&plain)));

        let (cut, to) = (cut.index(len), to.index(len));
        let (cut, to) = (cut.min(to), cut.max(to));
        prop_assert_eq!(residency.counts_in(cut as u64..to as u64), plain_counts(&plain[cut..to]));
        let runs = plain_runs(&plain[cut..to]).into_iter().map(|run| Run {
            pages: run.pages.start + cut as u64..run.pages.end + cut as u64,
            ..run
        });
        prop_assert!(residency.runs_in(cut as u64..to as u64).eq(runs));
    }

    #[test]
    fn is_never_larger_than_two_bits_a_page((residency, plain) in maps()) {
        let chunks = plain.len().div_ceil(SIZE as usize);
        let packed = SIZE as usize / 4;
        prop_assert!(residency.heap_bytes() <= chunks * (packed + size_of::<Chunk>()));
    }

    #[test]
    fn survives_every_way_to_rebuild_it((residency, _) in maps(), split in any::<prop::sample::Index>()) {
        let rebuilt = Residency::from_runs(residency.runs()).unwrap();
        prop_assert_eq!(&rebuilt, &residency);

        let mut built = Builder::starting_at(0);
        for run in residency.runs() {
            // In pieces, so that runs go on and cross the ends of chunks.
            let middle = run.pages.start.midpoint(run.pages.end);
            built.push(middle - run.pages.start, run.state);
            built.fill(run.pages.end, run.state);
        }
        prop_assert_eq!(built.end(), residency.len());
        prop_assert_eq!(&built.build(), &residency);

        let split = split.index(residency.len() as usize) as u64;
        let mut joined = residency.part(0..split);
        joined.append(&residency.part(split..residency.len() + 5));
        prop_assert_eq!(&joined, &residency);

        let part = residency.part(split..residency.len());
        prop_assert_eq!(part.pages(), split..residency.len());
        prop_assert!(part.runs().eq(residency.runs_in(part.pages())));
        prop_assert_eq!(part.counts_in(0..split), Counts::default());
        let elsewhere: Residency = residency.clone().renumbered(1 << 40);
        prop_assert_eq!(elsewhere.get(0), None);
        prop_assert!(elsewhere.part((1 << 40) + split..u64::MAX).runs().eq(part.renumbered((1 << 40) + split).runs()));

        let flat = Vec::from(residency.clone());
        prop_assert_eq!(&Residency::try_from(flat).unwrap(), &residency);
    }

    #[test]
    fn compares_two_maps_page_by_page((a, plain_a) in maps(), (b, plain_b) in maps(), table in any::<[bool; 9]>()) {
        let wanted = |a: PageState, b: PageState| table[a as usize * 3 + b as usize];
        let ranges: Vec<_> = a.ranges_where(&b, wanted).collect();
        prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        let pages: Vec<u64> = ranges.into_iter().flatten().collect();
        let pairs = plain_a.iter().zip(&plain_b).enumerate();
        let expected: Vec<u64> = pairs.filter(|(_, (a, b))| wanted(**a, **b)).map(|(page, _)| page as u64).collect();
        prop_assert_eq!(pages, expected);
        prop_assert_eq!(a == b, plain_a == plain_b);
        let states = [Hole, Resident, Swapped];
        let state = |a: PageState, b: PageState| states[(a as usize * 3 + b as usize + usize::from(table[0])) % 3];
        let combined: Vec<_> = plain_a.iter().zip(&plain_b).map(|(a, b)| state(*a, *b)).collect();
        prop_assert!(a.combine(&b, state).runs().eq(plain_runs(&combined)));
    }
}

#[test]
fn a_uniform_terabyte_is_small() {
    let mut residency = Residency::uniform(1 << 28, Swapped);
    assert!(residency.heap_bytes() < 400 << 10, "{}", residency.heap_bytes());
    residency.set(5..1 << 27, Resident);
    assert!(residency.heap_bytes() < 400 << 10);
    assert_eq!(residency.counts(), Counts { hole: 0, resident: (1 << 27) - 5, swapped: (1 << 27) + 5 });
    assert_eq!(residency.runs().count(), 3);
}

#[test]
fn refuses_runs_with_gaps_and_unbelievable_lengths() {
    let gap = [Run { pages: 0..4, state: Hole }, Run { pages: 5..6, state: Hole }];
    assert_eq!(Residency::from_runs(gap), Err(ResidencyError::NotConsecutive { expected: 4, found: 5 }));
    assert_eq!(Residency::<Page>::try_from(vec![(1, Hole), (u64::MAX, Hole)]), Err(ResidencyError::TooLong));
}

#[test]
fn debug_is_short() {
    let mut residency = Residency::<Page>::uniform(100_000, Hole);
    (0..100_000).step_by(2).for_each(|page| residency.set(page..page + 1, Swapped));
    assert!(format!("{residency:?}").len() < 400);
    assert_eq!(format!("{:?}", Residency::<Page>::uniform(3, Resident)), "Residency(3 pages, 0..3 Resident)");
}
