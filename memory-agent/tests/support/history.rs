//! Things that happen to memory, at random.

use memory_agent::page_out;

use super::{Memory, Random};

/// Random work on the pages of one thread; `stamps` is what they hold, 0 for holes.
pub(crate) fn work(memory: &Memory, first: u64, stamps: &mut [Option<u64>], random: &mut Random) {
    let mapping = memory.mapping();
    let pages = stamps.len() as u64;
    for _ in 0..60 {
        let start = random.below(pages);
        let most = 1 << random.below(8);
        let length = (1 + random.below(most)).min(pages - start);
        let what = random.below(6);
        if what == 4 {
            memory.punch(first + start, length);
        } else if what == 5 {
            page_out(&mapping, &[first + start..first + start + length]).unwrap();
        }
        for page in start..start + length {
            let stamp = &mut stamps[page as usize];
            match what {
                0 | 1 => {
                    let new = random.below(u64::MAX >> 12) + 1;
                    if what == 0 {
                        memory.write(first + page, new)
                    } else {
                        memory.pwrite(first + page, new)
                    };
                    *stamp = Some(new);
                }
                2 => assert!(memory.pread_holds(first + page, stamp.unwrap_or(0))),
                // A read through the mapping allocates a hole.
                3 => assert!(memory.holds(first + page, *stamp.get_or_insert(0))),
                4 => *stamp = None,
                _ => {}
            }
        }
    }
}
