//! What a Linux guest says of itself, for those who run one: a line each on its console, whatever else is said there.
//!
//! `guest-check` says them; [`Said::parse`] reads them.

pub mod stream;

use std::fmt;

/// In front of each line.
pub const MARK: &str = "guest: ";
/// The kernel's parameter that says what to check, separated by commas: `thermocline.test=disk,dmesg,poweroff`.
pub const TEST_PARAMETER: &str = "thermocline.test=";
/// The kernel's parameter that says which address the guest's network has: `thermocline.address=172.31.0.2/24`.
pub const ADDRESS_PARAMETER: &str = "thermocline.address=";
/// The file on the guest's disk that the host has made.
pub const PATTERN_FILE: &str = "pattern";
/// Its length, bytes.
pub const PATTERN_BYTES: usize = 1 << 20;

/// `length` bytes that no other seed gives.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    // xorshift64*, which must not begin with 0.
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let word = |_| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(word).collect();
    bytes.truncate(length);
    bytes
}

/// One line of the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// A check has passed, with what it found as `NAME=VALUE` words.
    Passed {
        /// The check's name.
        check: String,
        /// What it found.
        found: String,
    },
    /// A check has failed.
    Failed {
        /// The check's name.
        check: String,
        /// A sentence.
        why: String,
    },
    /// News of a check that goes on.
    News {
        /// The check's name.
        check: String,
        /// What it says.
        text: String,
    },
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (check, word, text) = match self {
            Self::Passed { check, found } => (check, "passed", found),
            Self::Failed { check, why } => (check, "failed", why),
            Self::News { check, text } => (check, "says", text),
        };
        // Whatever it is, it is one line.
        let text = text.replace(['\n', '\r'], " ");
        write!(f, "{MARK}{check} {word} {text}")
    }
}

impl Said {
    /// Reads a line of the console; none where it is not the guest's program that speaks. The kernel's messages may have
    /// come before it in the same line.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, said) = line.trim_end().rsplit_once(MARK)?;
        let (check, rest) = said.split_once(' ')?;
        let (word, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let (check, text) = (check.to_owned(), text.to_owned());
        match word {
            "passed" => Some(Self::Passed { check, found: text }),
            "failed" => Some(Self::Failed { check, why: text }),
            "says" => Some(Self::News { check, text }),
            _ => None,
        }
    }
}

/// The value of `NAME=VALUE` among words.
pub fn value<'a>(words: &'a str, name: &str) -> Option<&'a str> {
    words.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_there_and_back() {
        for said in [
            Said::Passed { check: "disk".into(), found: "bytes=7 queues=2".into() },
            Said::Passed { check: "rng".into(), found: String::new() },
            Said::Failed { check: "ping".into(), why: "no answer: 3 of 3 lost".into() },
            Said::News { check: "dmesg".into(), text: "3 ACPI Error: guest said so".into() },
        ] {
            assert_eq!(Said::parse(&said.to_string()), Some(said.clone()));
            assert_eq!(Said::parse(&format!("[    1.2] random: {said}\r")), Some(said));
        }
        let two = Said::Failed { check: "disk".into(), why: "a\nb".into() };
        assert_eq!(two.to_string(), "guest: disk failed a b");
    }

    #[test]
    fn other_lines_are_nobodys() {
        for line in
            ["", "guest: ", "guest: disk", "guest: disk perhaps 1", "[    0.0] Linux version 6.12", "guest disk passed"]
        {
            assert_eq!(Said::parse(line), None, "{line}");
        }
    }

    #[test]
    fn values_are_found_by_their_whole_names() {
        assert_eq!(value("sectors=8 ors=9", "ors"), Some("9"));
        assert_eq!(value("sectors=8", "sector"), None);
    }

    #[test]
    fn patterns_differ_and_are_whole() {
        assert_eq!(pattern(1, 13), pattern(1, 16)[..13]);
        assert_ne!(pattern(1, 64), pattern(2, 64));
        assert_ne!(pattern(0, 64), vec![0; 64]);
    }
}
