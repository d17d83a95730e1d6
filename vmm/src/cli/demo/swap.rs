//! Somewhere for cold pages to go: the swap that is on, or a zram device for the time of the demo.

use std::fmt;

use memory_agent::{ByteSize, ScopedZram, SwapDevice};

/// Where cold pages go.
pub(super) enum DemoSwap {
    /// Swap that was on already.
    Existing(Vec<SwapDevice>),
    /// Ours, removed when this is dropped.
    Own(ScopedZram, ByteSize),
    /// Nowhere.
    None(String),
}

/// Uses the swap that is on, or makes some twice the size of `memory`.
pub(super) fn prepare(memory: ByteSize) -> DemoSwap {
    match memory_agent::active() {
        Ok(devices) if !devices.is_empty() => return DemoSwap::Existing(devices),
        Ok(_) => {}
        Err(e) => return DemoSwap::None(e.to_string()),
    }
    let size = ByteSize(memory.bytes().saturating_mul(2));
    match ScopedZram::new(size.bytes()) {
        Ok(zram) => DemoSwap::Own(zram, size),
        Err(e) => DemoSwap::None(e.to_string()),
    }
}

impl DemoSwap {
    /// Whether pages can be swapped out.
    pub(super) fn is_usable(&self) -> bool {
        !matches!(self, Self::None(_))
    }
}

impl fmt::Display for DemoSwap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Existing(devices) => {
                let names: Vec<_> = devices.iter().map(|d| d.path.display().to_string()).collect();
                write!(f, "using the swap that is on: {}", names.join(", "))
            }
            Self::Own(zram, size) => {
                write!(
                    f,
                    "no swap is on: set up {} with {size} for the time of this demo; it is removed at the end",
                    zram.path().display()
                )
            }
            Self::None(why) => {
                write!(f, "no swap is on and none can be set up, so nothing will go cold: {why}")
            }
        }
    }
}
