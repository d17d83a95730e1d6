#![doc = include_str!("../README.md")]
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod agent;
mod byte_size;
mod guard;
mod memory;
mod memory_group;
mod metrics;
mod missing;
mod page_number;
mod page_out;
mod page_range;
mod page_state;
pub mod picture;
mod probe;
mod residency;
mod scan;
mod swap;
mod sys;
mod usage;
mod vmstat;
mod zram;

pub use agent::{Agent, AgentCost, AgentError, AgentMap, AgentOptions, Suspended};
pub use byte_size::{ByteSize, ByteSizeError};
pub use guard::{GuardError, GuardReport, ResidencyGuard};
pub use memory::{FileView, LeftOut, Mapping, PageTables, Process, ProcessMemory, SharedMemory, Target, TargetError};
pub use memory_group::{MemoryGroup, SwapLimit};
pub use metrics::Metrics;
pub use missing::{FaultError, LandingView, MissingFaults, NotFilled, Registered};
pub use page_number::{FilePage, Page, PageNumber};
pub use page_out::{PageOutError, PageOutOptions, PageOutReport, no_room, page_out, page_out_with};
pub use page_range::{PageRange, PageRanges};
pub use page_state::{Counts, PAGE_SIZE, PageState, is_zero};
pub use probe::{
    ChosenProbe, ExactScan, Hint, HintProbe, KernelOffer, Marker, PageCache, PageCacheBySeek, Probe, ProbeChoice,
    ProbeError, ProbeKind, UffdMarker, exact_probe,
};
pub use residency::{Residency, ResidencyError, Run, Runs};
pub use scan::{
    ContentHash, Reader, ResidencySnapshot, ScanError, ScanGuard, ScanProgress, ScanReport, ScanView, SparseDump,
    ZeroFinder, scan, windows,
};
pub use swap::{SwapDevice, SwapError, SwapKind, active, zswap_is_enabled};
pub use usage::{UsageError, counts_of};
pub use vmstat::{SwapCounters, VmstatError};
pub use zram::{ScopedZram, ZramError};
