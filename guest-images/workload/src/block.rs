//! What a block of the disk holds: its number, its generation, and words that follow from both.
//!
//! A block says of itself what it should be, so that whoever reads it, guest or host, finds out without a record of what
//! was written. With such a record a stale block is found too. Compiled into the image and into the host library.

use crate::pattern;

/// Bytes in a block: what is written, checked and remembered as one.
pub const BLOCK: u64 = 4096;

/// 64-bit words in a block.
pub const WORDS: usize = 512;

/// Words at the start of a block that are always its own: number, generation with mark, first word of the pattern.
const HEAD: usize = 3;

/// Marks a block of which only the head is its own; the rest is whatever was in the buffer.
const STAMPED: u64 = 1 << 32;

/// Says that a block is one of the guest's.
const OURS: u64 = 0x7468_6572 << 33;

/// How much of a block is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Every word.
    Full,
    /// The first three words: as little as finds a block that is elsewhere or stale, for when writing the rest would be
    /// what is measured.
    Stamp,
}

/// What a block holds, so far as it can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It is whole, and was written as of this generation.
    Generation(u32),
    /// Nothing but zeros.
    Zeros,
    /// Not the guest's: never written by it.
    Foreign,
    /// The guest's, but not what was written.
    Damaged(Damage),
}

/// The first word of a block that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Its index, 0 to 511.
    pub word: u32,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

fn word(number: u64, seed: u64, generation: u32, index: usize, mark: u64) -> u64 {
    match index {
        0 => number,
        1 => OURS | mark | u64::from(generation),
        _ => pattern::word(pattern::key(number, seed, generation), index),
    }
}

/// Writes block `number` as of `generation` through `put(index, word)`.
#[inline]
pub fn write(number: u64, seed: u64, generation: u32, coverage: Coverage, mut put: impl FnMut(usize, u64)) {
    let (mark, words) = match coverage {
        Coverage::Full => (0, WORDS),
        Coverage::Stamp => (STAMPED, HEAD),
    };
    (0..words).for_each(|index| put(index, word(number, seed, generation, index, mark)));
}

/// What a block holds that should be `number`, read through `get(index)`.
#[inline]
pub fn read(number: u64, seed: u64, get: impl Fn(usize) -> u64) -> Content {
    let second = get(1);
    if second & !(STAMPED | 0xffff_ffff) != OURS {
        let zeros = (0..WORDS).all(|index| get(index) == 0);
        return if zeros { Content::Zeros } else { Content::Foreign };
    }
    let (mark, generation) = (second & STAMPED, second as u32);
    let words = if mark == 0 { WORDS } else { HEAD };
    for index in 0..words {
        let (expected, found) = (word(number, seed, generation, index, mark), get(index));
        if found != expected {
            return Content::Damaged(Damage { word: index as u32, expected, found });
        }
    }
    Content::Generation(generation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(number: u64, seed: u64, generation: u32, coverage: Coverage) -> Vec<u64> {
        let mut words = vec![7; WORDS];
        write(number, seed, generation, coverage, |index, word| words[index] = word);
        words
    }

    fn content(number: u64, seed: u64, words: &[u64]) -> Content {
        read(number, seed, |index| words[index])
    }

    #[test]
    fn what_is_not_the_guests_is_told_apart() {
        assert_eq!(content(0, 1, &[0; WORDS]), Content::Zeros);
        assert_eq!(content(0, 1, &[1; WORDS]), Content::Foreign);
    }

    proptest! {
        #[test]
        fn a_block_reads_as_it_was_written(number: u64, seed: u64, generation: u32, stamp: bool) {
            let coverage = if stamp { Coverage::Stamp } else { Coverage::Full };
            let words = block(number, seed, generation, coverage);
            prop_assert_eq!(content(number, seed, &words), Content::Generation(generation));
            let elsewhere = content(number.wrapping_add(1), seed, &words);
            prop_assert!(matches!(elsewhere, Content::Damaged(Damage { word: 0, .. })), "{:?}", elsewhere);
        }

        #[test]
        fn any_bit_counts(number: u64, generation: u32, index in 0..WORDS, bit in 0u32..64) {
            let mut words = block(number, 1, generation, Coverage::Full);
            words[index] ^= 1 << bit;
            prop_assert_ne!(content(number, 1, &words), Content::Generation(generation));
        }
    }
}
