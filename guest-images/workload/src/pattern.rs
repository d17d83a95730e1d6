//! What every page holds: 512 words that follow from page number, seed and generation, and look random.
//!
//! Each word can be computed on its own, so a host test can check one page, or one word, of guest memory without
//! replaying anything. Compiled into the image and into the host library.

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// 64-bit words in a page.
pub const WORDS: usize = 512;

/// The odd constant that spaces the states of splitmix64: 2^64 divided by the golden ratio.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of splitmix64: a bijection of 64-bit words in which every input bit reaches every output bit.
#[inline]
pub const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The key of a page: `page` is its guest physical address divided by 4096.
#[inline]
pub const fn key(page: u64, seed: u64, generation: u32) -> u64 {
    mix(mix(mix(seed).wrapping_add(page)).wrapping_add(generation as u64))
}

/// Word `index` (0 to 511) of the page with this [`key`].
#[inline]
pub const fn word(key: u64, index: usize) -> u64 {
    mix(key.wrapping_add((index as u64 + 1).wrapping_mul(GAMMA)))
}

/// A stream of pseudo-random words (splitmix64), by which pages are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// A stream of its own for every `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(mix(seed ^ GAMMA))
    }

    /// The next word.
    #[inline]
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// The next number below `bound`, which is not zero.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.word()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_words_stay() {
        // These values are part of the protocol: a host of one version checks the pages of a guest of another.
        assert_eq!(mix(GAMMA), 0xe220_a839_7b1d_cdaf);
        assert_eq!(word(0, 0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(key(0, 0, 0), 0);
    }

    #[test]
    fn a_page_has_no_repeats_and_even_bits() {
        let k = key(512, 1, 0);
        let words: std::collections::HashSet<u64> = (0..WORDS).map(|i| word(k, i)).collect();
        assert_eq!(words.len(), WORDS);
        let ones: u32 = words.iter().map(|w| w.count_ones()).sum();
        assert!((15_900..16_900).contains(&ones), "{ones} of 32768 bits");
    }

    proptest! {
        #[test]
        fn neighbours_differ(page in 0u64..1 << 24, seed: u64, generation in 0u32..u32::MAX, index in 0..WORDS) {
            let here = word(key(page, seed, generation), index);
            prop_assert_ne!(here, word(key(page + 1, seed, generation), index));
            prop_assert_ne!(here, word(key(page, seed, generation + 1), index));
        }

        #[test]
        fn below_is_below(seed: u64, bound in 1u64..) {
            prop_assert!(Random::new(seed).below(bound) < bound);
        }
    }
}
