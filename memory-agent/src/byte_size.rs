//! Sizes as people write them.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes, written like `512MiB` or `1GiB`.
///
/// `K`, `M`, `G` and `T` with or without `iB` are powers of 1024, as in QEMU's `-m`.
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
    /// The unit is none of those known.
    #[error("'{unit}' is not a unit: use B, KiB, MiB, GiB or TiB")]
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
        let number: u64 = number.parse().map_err(|source| ByteSizeError::Number { text: text.into(), source })?;
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
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
    use super::*;

    #[test]
    fn sizes_are_read_as_written() {
        assert_eq!("1GiB".parse(), Ok(ByteSize(1 << 30)));
        assert_eq!("512M".parse(), Ok(ByteSize::mib(512)));
        assert_eq!("4096".parse(), Ok(ByteSize(4096)));
        assert_eq!("16 MiB".parse(), Ok(ByteSize::mib(16)));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        assert!(matches!("".parse::<ByteSize>(), Err(ByteSizeError::Number { .. })));
        assert!(matches!("-1M".parse::<ByteSize>(), Err(ByteSizeError::Number { .. })));
        assert!(matches!("1 parsec".parse::<ByteSize>(), Err(ByteSizeError::Unit { .. })));
        assert!(matches!("99999999999T".parse::<ByteSize>(), Err(ByteSizeError::TooLarge { .. })));
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(ByteSize(1 << 30).to_string(), "1 GiB");
        assert_eq!(ByteSize::mib(1536).to_string(), "1.5 GiB");
        assert_eq!(ByteSize(12).to_string(), "12 B");
    }
}
