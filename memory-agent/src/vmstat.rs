//! How much the whole host has swapped.

use std::fs::read_to_string;
use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why the host's counters cannot be read.
#[derive(Debug, Error)]
pub enum VmstatError {
    /// `/proc/vmstat` cannot be read.
    #[error("cannot read /proc/vmstat: {0}; mount /proc")]
    Read(io::Error),
    /// A counter is missing.
    #[error("/proc/vmstat has no number for {0}: use a kernel with CONFIG_VM_EVENT_COUNTERS and CONFIG_SWAP")]
    Missing(&'static str),
}

/// Pages that the whole host has swapped in and out since it started, or between two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapCounters {
    /// Pages read from swap devices (`pswpin`).
    pub swap_ins: u64,
    /// Pages written to swap devices (`pswpout`).
    pub swap_outs: u64,
}

impl SwapCounters {
    /// The counters now, from `/proc/vmstat`.
    ///
    /// # Errors
    /// [`VmstatError`] when the kernel does not tell.
    pub fn read() -> Result<Self, VmstatError> {
        Self::parse(&read_to_string("/proc/vmstat").map_err(VmstatError::Read)?)
    }

    /// What was added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            swap_ins: self.swap_ins.saturating_sub(earlier.swap_ins),
            swap_outs: self.swap_outs.saturating_sub(earlier.swap_outs),
        }
    }

    fn parse(text: &str) -> Result<Self, VmstatError> {
        let number = |name| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.and_then(|v| v.trim().parse().ok()).ok_or(VmstatError::Missing(name))
        };
        Ok(Self { swap_ins: number("pswpin")?, swap_outs: number("pswpout")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_two_counters() {
        let counters = SwapCounters::parse("nr_x 1\npswpinside 9\npswpin 12\npswpout 34\n").unwrap();
        assert_eq!(counters, SwapCounters { swap_ins: 12, swap_outs: 34 });
        assert!(matches!(SwapCounters::parse("pswpin 1\n"), Err(VmstatError::Missing("pswpout"))));
        assert!(matches!(SwapCounters::parse("pswpin x\npswpout 2"), Err(VmstatError::Missing("pswpin"))));
    }

    #[test]
    fn difference_is_what_was_added() {
        let earlier = SwapCounters { swap_ins: 5, swap_outs: 7 };
        let later = SwapCounters { swap_ins: 6, swap_outs: 17 };
        assert_eq!(later.since(&earlier), SwapCounters { swap_ins: 1, swap_outs: 10 });
    }
}
