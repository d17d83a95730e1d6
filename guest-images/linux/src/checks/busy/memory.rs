//! Memory: pages that are read and written all the time, and many more that are written once. Every byte follows from its place
//! and from how often its page has been written.

use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use linux_guest::stream::fill;

use super::{Random, Shared};
use crate::Outcome;

const PAGE_BYTES: usize = 4096;
/// Of each processor's thread: pages that it works with, and pages that it writes once.
const WORKING_SET: usize = 2 << 20 >> 12;
const COLD: usize = 16 << 20 >> 12;
/// Pages between two pauses.
const BURST: usize = 8;
const PAUSE: Duration = Duration::from_millis(20);
/// How often one of those is looked at that were written once.
const COLD_PERIOD: Duration = Duration::from_secs(10);

/// Works until it is over, then looks at everything.
pub(super) fn run(processor: usize, shared: &Shared) -> Outcome {
    let mut random = Random(processor as u64);
    let mut working = Area::new(processor as u64, WORKING_SET);
    let cold = Area::new(0x100 + processor as u64, COLD);
    let mut next_cold = Instant::now() + COLD_PERIOD;
    while !shared.is_over() {
        for turn in 0..BURST {
            let page = random.below(WORKING_SET);
            working.check(page)?;
            if turn % 2 == 0 {
                working.write(page);
            }
        }
        shared.pages.fetch_add(BURST as u64, Ordering::Relaxed);
        if Instant::now() >= next_cold {
            cold.check(random.below(COLD)).map_err(|why| format!("of what was written once: {why}"))?;
            next_cold = Instant::now() + COLD_PERIOD;
        }
        sleep(PAUSE);
    }
    (0..WORKING_SET).try_for_each(|page| working.check(page))?;
    (0..COLD).try_for_each(|page| cold.check(page)).map_err(|why| format!("of what was written once: {why}"))?;
    Ok(String::new())
}

/// Pages, and how often each has been written.
struct Area {
    seed: u64,
    bytes: Vec<u8>,
    generations: Vec<u32>,
}

impl Area {
    fn new(seed: u64, pages: usize) -> Self {
        let mut area = Self { seed, bytes: vec![0; pages * PAGE_BYTES], generations: vec![0; pages] };
        (0..pages).for_each(|page| area.write(page));
        area
    }

    fn write(&mut self, page: usize) {
        self.generations[page] += 1;
        let seed = self.seed_of(self.generations[page]);
        let start = page * PAGE_BYTES;
        fill(seed, start as u64, &mut self.bytes[start..start + PAGE_BYTES]);
    }

    fn check(&self, page: usize) -> Result<(), String> {
        let generation = self.generations[page];
        let start = page * PAGE_BYTES;
        let found = &self.bytes[start..start + PAGE_BYTES];
        let mut expected = [0; PAGE_BYTES];
        fill(self.seed_of(generation), start as u64, &mut expected);
        let Some(place) = found.iter().zip(&expected).position(|(found, expected)| found != expected) else {
            return Ok(());
        };
        // Which one it is instead says whether a write was lost.
        let older = (0..generation).rev().take(8).find(|&older| {
            fill(self.seed_of(older), start as u64, &mut expected);
            found == expected
        });
        Err(match older {
            Some(older) => format!("page {page} is as it was after {older} writes, of {generation}"),
            None => format!("page {page}, written {generation} times, differs at byte {place}"),
        })
    }

    fn seed_of(&self, generation: u32) -> u64 {
        self.seed << 32 | u64::from(generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_what_was_written_last() {
        let mut area = Area::new(3, 4);
        area.write(2);
        area.write(2);
        (0..4).for_each(|page| area.check(page).unwrap());
    }

    #[test]
    fn a_lost_write_and_a_changed_byte_are_told() {
        let mut area = Area::new(3, 4);
        let old = area.bytes.clone();
        area.write(1);
        area.bytes = old;
        assert_eq!(area.check(1), Err("page 1 is as it was after 1 writes, of 2".into()));
        area.check(0).unwrap();
        area.bytes[2 * PAGE_BYTES + 7] ^= 1;
        assert_eq!(area.check(2), Err("page 2, written 1 times, differs at byte 7".into()));
        area.bytes.fill(0);
        assert!(area.check(3).is_err());
    }
}
