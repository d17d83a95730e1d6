//! Sizes as people write them.

use std::fmt;
use std::num::{IntErrorKind, ParseIntError};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes, written like `512MiB` or `1GiB`.
///
/// `K`, `M`, `G` and `T`, alone or with `B` or `iB`, in either case, are powers of 1024: memory comes in no others, and the options
/// of QEMU, Cloud Hypervisor and Firecracker mean them, too. A number alone is bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// Why a text is not a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ByteSizeError {
    /// There is no number, or it has other characters in it.
    #[error("'{text}' is not a size: write a number and a unit, such as 512MiB or 1GiB")]
    Number {
        /// What was given.
        text: String,
        /// What the number parser said.
        source: ParseIntError,
    },
    /// The number is no whole one.
    #[error("'{text}' is not a whole number: write it in a smaller unit, such as 1536MiB for 1.5 GiB")]
    Fraction {
        /// What was given.
        text: String,
    },
    /// The unit is none of those known.
    #[error("'{unit}' is not a unit of memory: use K, M, G or T (KiB, MiB, GiB or TiB, powers of 1024), or B")]
    Unit {
        /// What was given.
        unit: String,
    },
    /// The size does not fit 64 bits.
    #[error("'{text}' is larger than any memory")]
    TooLarge {
        /// What was given.
        text: String,
    },
}

impl ByteSize {
    /// One mebibyte times `n`.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The number of whole 4 KiB pages.
    pub const fn pages(self) -> u64 {
        self.0 / crate::page_state::PAGE_SIZE
    }
}

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let number: u64 = number.parse().map_err(|source: ParseIntError| match source.kind() {
            IntErrorKind::PosOverflow => ByteSizeError::TooLarge { text: text.into() },
            _ => ByteSizeError::Number { text: text.into(), source },
        })?;
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            unit if unit.starts_with('.') => return Err(ByteSizeError::Fraction { text: text.into() }),
            _ => return Err(ByteSizeError::Unit { unit: unit.trim().into() }),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| ByteSizeError::TooLarge { text: text.into() })
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit that shows the size exactly; with a fraction, one decimal of the unit below it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in UNITS {
            let one = 1u64 << shift;
            if self.0 >= one {
                return if self.0.is_multiple_of(one) {
                    write!(f, "{} {unit}", self.0 >> shift)
                } else {
                    write!(f, "{:.1} {unit}", self.0 as f64 / one as f64)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_as_written() {
        assert_eq!("1GiB".parse(), Ok(ByteSize(1 << 30)));
        assert_eq!("512M".parse(), Ok(ByteSize::mib(512)));
        assert_eq!("4096".parse(), Ok(ByteSize(4096)));
        assert_eq!("16 MiB".parse(), Ok(ByteSize::mib(16)));
    }

    #[test]
    fn every_usual_spelling_is_one_size() {
        for text in
            ["1G", "1g", "1GB", "1gb", "1GiB", "1 GiB", " 1024M ", "1024MB", "1048576k", "1073741824", "1073741824B"]
        {
            assert_eq!(text.parse(), Ok(ByteSize(1 << 30)), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(number in 0_u64..1 << 24, unit in 0_usize..5, spelling in 0_usize..3, lower: bool) {
            let unit = [["", "B", " b"], ["K", "KB", " KiB"], ["M", "MB", " MiB"], ["G", "GB", " GiB"], ["T", "TB", " TiB"]]
                .map(|spellings| spellings[spelling])
                .into_iter()
                .zip([0, 10, 20, 30, 40])
                .nth(unit);
            let (unit, shift) = unit.unwrap();
            let text = format!("{number}{unit}");
            let text = if lower { text.to_lowercase() } else { text };
            prop_assert_eq!(text.parse(), Ok(ByteSize(number << shift)));
        }

        #[test]
        fn what_is_shown_without_a_fraction_is_read_as_the_same(bytes: u64, shift in 0_u32..64) {
            let size = ByteSize(bytes >> shift << (shift / 2));
            let shown = size.to_string();
            if !shown.contains('.') {
                prop_assert_eq!(shown.parse(), Ok(size));
            }
        }

        #[test]
        fn no_text_is_a_panic(text in ".{0,24}") {
            if let Err(e) = text.parse::<ByteSize>() {
                prop_assert!(!e.to_string().is_empty());
            }
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        assert!(matches!("".parse::<ByteSize>(), Err(ByteSizeError::Number { .. })));
        assert!(matches!("-1M".parse::<ByteSize>(), Err(ByteSizeError::Number { .. })));
        assert!(matches!("1 parsec".parse::<ByteSize>(), Err(ByteSizeError::Unit { .. })));
        assert!(matches!("1.5G".parse::<ByteSize>(), Err(ByteSizeError::Fraction { .. })));
        assert!(matches!("99999999999T".parse::<ByteSize>(), Err(ByteSizeError::TooLarge { .. })));
        assert!(matches!("99999999999999999999".parse::<ByteSize>(), Err(ByteSizeError::TooLarge { .. })));
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(ByteSize(1 << 30).to_string(), "1 GiB");
        assert_eq!(ByteSize::mib(1536).to_string(), "1.5 GiB");
        assert_eq!(ByteSize(12).to_string(), "12 B");
    }
}
