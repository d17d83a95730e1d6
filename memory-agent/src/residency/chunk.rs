//! The states of 64 MiB of pages, in whichever of three forms is smallest.

use std::ops::Range;

use crate::page_state::{Counts, PageState};

/// Pages in a chunk. With 2^14 of them a run's first page and its state fit 16 bits together, and the
/// packed form is 4 KiB.
pub(super) const CHUNK_PAGES: u32 = 1 << 14;

/// Above this many runs the packed form is used. It is half of what would be smaller as runs, because
/// inserting into a sorted list moves its tail.
const MAX_RUNS: usize = 1024;

const PAGES_PER_WORD: u32 = 32;
const WORDS: usize = (CHUNK_PAGES / PAGES_PER_WORD) as usize;
/// The low bit of every page in a word.
const LOW_BITS: u64 = 0x5555_5555_5555_5555;

#[derive(Clone)]
pub(super) enum Chunk {
    Uniform(PageState),
    /// First page (14 bits, high) and state (2 bits, low) of each maximal run, sorted; the first is page 0.
    Runs(Vec<u16>),
    /// Two bits a page, the lowest page in the lowest bits.
    Packed(Box<[u64; WORDS]>),
}

fn code(state: PageState) -> u64 {
    match state {
        PageState::Hole => 0,
        PageState::Resident => 1,
        PageState::Swapped => 2,
    }
}

fn state_of(code: u64) -> PageState {
    match code & 3 {
        0 => PageState::Hole,
        1 => PageState::Resident,
        _ => PageState::Swapped,
    }
}

fn entry(start: u32, state: PageState) -> u16 {
    (start << 2) as u16 | code(state) as u16
}

fn start_of(entry: u16) -> u32 {
    u32::from(entry >> 2)
}

fn entry_state(entry: u16) -> PageState {
    state_of(u64::from(entry))
}

impl Chunk {
    /// The state of `page`, and the end of the run it is in, at most `CHUNK_PAGES`.
    pub(super) fn run_at(&self, page: u32) -> (PageState, u32) {
        match self {
            Self::Uniform(state) => (*state, CHUNK_PAGES),
            Self::Runs(runs) => {
                let next = runs.partition_point(|&e| start_of(e) <= page);
                let end = runs.get(next).map_or(CHUNK_PAGES, |&e| start_of(e));
                (entry_state(runs[next - 1]), end)
            }
            Self::Packed(words) => packed_run_at(words, page),
        }
    }

    pub(super) fn set(&mut self, pages: Range<u32>, state: PageState) {
        if pages.is_empty() {
            return;
        }
        if pages == (0..CHUNK_PAGES) {
            *self = Self::Uniform(state);
            return;
        }
        match self {
            Self::Uniform(old) if *old == state => {}
            Self::Uniform(old) => {
                let mut runs = vec![entry(0, *old)];
                set_in_runs(&mut runs, pages, state);
                *self = Self::Runs(runs);
            }
            Self::Runs(runs) => {
                set_in_runs(runs, pages, state);
                if runs.len() == 1 {
                    *self = Self::Uniform(state);
                } else if runs.len() > MAX_RUNS {
                    *self = Self::Packed(pack(runs));
                }
            }
            Self::Packed(words) => {
                fill(words, pages.clone(), state);
                // Only a long write can have merged many runs; short ones would pay the count in vain.
                if pages.len() >= MAX_RUNS {
                    self.shrink();
                }
            }
        }
    }

    /// Leaves the packed form when few runs are left, well below the limit so that it is not entered at
    /// once again.
    fn shrink(&mut self) {
        let Self::Packed(words) = self else { return };
        if packed_run_count(words) > MAX_RUNS / 2 {
            return;
        }
        let mut runs = Vec::new();
        let mut page = 0;
        while page < CHUNK_PAGES {
            let (state, end) = packed_run_at(words, page);
            runs.push(entry(page, state));
            page = end;
        }
        *self = match runs[..] {
            [only] => Self::Uniform(entry_state(only)),
            _ => Self::Runs(runs),
        };
    }

    pub(super) fn counts_in(&self, pages: Range<u32>) -> Counts {
        if let Self::Packed(words) = self {
            return packed_counts(words, pages);
        }
        let mut counts = Counts::default();
        let mut page = pages.start;
        while page < pages.end {
            let (state, end) = self.run_at(page);
            let end = end.min(pages.end);
            counts.count(state, u64::from(end - page));
            page = end;
        }
        counts
    }

    pub(super) fn heap_bytes(&self) -> usize {
        match self {
            Self::Uniform(_) => 0,
            Self::Runs(runs) => runs.capacity() * size_of::<u16>(),
            Self::Packed(words) => size_of_val(&**words),
        }
    }
}

/// The pages of a chunk that is being made from its beginning on.
#[derive(Default)]
pub(super) struct Tail {
    len: u32,
    runs: Vec<u16>,
    /// Once there are too many runs.
    packed: Option<Box<[u64; WORDS]>>,
}

impl Tail {
    /// Number of pages so far, below [`CHUNK_PAGES`] or equal.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Appends as many pages as there is room for.
    pub(super) fn push(&mut self, pages: u32, state: PageState) {
        let start = self.len;
        self.len = CHUNK_PAGES.min(start + pages);
        if let Some(words) = &mut self.packed {
            fill(words, start..self.len, state);
        } else if start == self.len || self.runs.last().is_some_and(|&last| entry_state(last) == state) {
            // The last run goes on.
        } else if self.runs.len() < MAX_RUNS {
            self.runs.push(entry(start, state));
        } else {
            let mut words = pack(&self.runs);
            fill(&mut words, start..self.len, state);
            (self.packed, self.runs) = (Some(words), Vec::new());
        }
    }

    /// The chunk; pages behind the last one may be anything.
    pub(super) fn chunk(self) -> Chunk {
        match (self.packed, &self.runs[..]) {
            (Some(words), _) => Chunk::Packed(words),
            (None, []) => Chunk::Uniform(PageState::Hole),
            (None, [only]) => Chunk::Uniform(entry_state(*only)),
            (None, runs) => Chunk::Runs(runs.to_vec()),
        }
    }
}

fn set_in_runs(runs: &mut Vec<u16>, pages: Range<u32>, state: PageState) {
    // Entries first..last start within the range or exactly at its end: all of them go.
    let first = runs.partition_point(|&e| start_of(e) < pages.start);
    let last = first + runs[first..].partition_point(|&e| start_of(e) <= pages.end);
    let before = first.checked_sub(1).map(|i| entry_state(runs[i]));
    let after = (pages.end < CHUNK_PAGES).then(|| entry_state(runs[last - 1]));

    let mut new = [0; 2];
    let mut count = 0;
    if before != Some(state) {
        new[count] = entry(pages.start, state);
        count += 1;
    }
    if let Some(after) = after.filter(|&after| after != state) {
        new[count] = entry(pages.end, after);
        count += 1;
    }
    runs.splice(first..last, new[..count].iter().copied());
}

fn pack(runs: &[u16]) -> Box<[u64; WORDS]> {
    let mut words = Box::new([0; WORDS]);
    for (i, &run) in runs.iter().enumerate() {
        let end = runs.get(i + 1).map_or(CHUNK_PAGES, |&next| start_of(next));
        fill(&mut words, start_of(run)..end, entry_state(run));
    }
    words
}

/// The bits of pages `from..to` (0 to 32) within a word.
fn mask(from: u32, to: u32) -> u64 {
    let below = |n: u32| {
        if n == PAGES_PER_WORD { u64::MAX } else { (1 << (2 * n)) - 1 }
    };
    below(to) & !below(from)
}

/// Calls `each` with every word that has pages of the range, and the mask of those pages.
fn for_words(pages: Range<u32>, mut each: impl FnMut(usize, u64)) {
    let mut page = pages.start;
    while page < pages.end {
        let word = page / PAGES_PER_WORD;
        let first = word * PAGES_PER_WORD;
        let end = pages.end.min(first + PAGES_PER_WORD);
        each(word as usize, mask(page - first, end - first));
        page = end;
    }
}

fn fill(words: &mut [u64; WORDS], pages: Range<u32>, state: PageState) {
    let pattern = code(state) * LOW_BITS;
    for_words(pages, |word, mask| words[word] = words[word] & !mask | pattern & mask);
}

fn packed_run_at(words: &[u64; WORDS], page: u32) -> (PageState, u32) {
    let mut word = page / PAGES_PER_WORD;
    let within = page % PAGES_PER_WORD;
    let state = words[word as usize] >> (2 * within) & 3;
    let pattern = state * LOW_BITS;
    let mut different = (words[word as usize] ^ pattern) & mask(within, PAGES_PER_WORD);
    while different == 0 {
        word += 1;
        if word as usize == WORDS {
            return (state_of(state), CHUNK_PAGES);
        }
        different = words[word as usize] ^ pattern;
    }
    (state_of(state), word * PAGES_PER_WORD + different.trailing_zeros() / 2)
}

fn packed_run_count(words: &[u64; WORDS]) -> usize {
    let mut previous = !words[0] & 3;
    let mut changes = 0;
    for &word in words {
        let changed = word ^ (word << 2 | previous);
        changes += ((changed | changed >> 1) & LOW_BITS).count_ones() as usize;
        previous = word >> 62;
    }
    changes
}

fn packed_counts(words: &[u64; WORDS], pages: Range<u32>) -> Counts {
    let mut counts = Counts::default();
    for_words(pages.clone(), |word, mask| {
        let word = words[word] & mask;
        counts.resident += u64::from((word & LOW_BITS).count_ones());
        counts.swapped += u64::from((word >> 1 & LOW_BITS).count_ones());
    });
    counts.hole = u64::from(pages.end - pages.start) - counts.resident - counts.swapped;
    counts
}
