//! What the host knows of a process's shared pages, and what can be done about it.
//!
//! A shared memory file (memfd) mapped by a process holds pages of three kinds: *holes*, which were never
//! written, *resident* pages, and *swapped* pages ([`PageState`]). This crate tells which is which without
//! changing it ([`Probe`], [`PageCache`]), pages out and checks that it happened ([`page_out`]), and lets
//! somebody read such memory and leave it as warm and as cold as it was ([`ScanGuard`]).
//!
//! It knows Linux memory, and nothing of what the memory is used for.

mod page_out;
mod page_state;
mod probe;
mod residency;
mod scan;
mod scan_view;
mod swap;
mod sys;
mod target;
mod usage;
mod vmstat;
mod zram;

pub use page_out::{PageOutError, PageOutReport, page_out};
pub use page_state::{Counts, PAGE_SIZE, PageState};
pub use probe::{Certainty, PageCache, PageCacheBySeek, Probe, ProbeError};
pub use residency::{Residency, ResidencyError, Run, Runs};
pub use scan::{Remembered, ScanError, ScanGuard, windows};
pub use scan_view::ScanView;
pub use swap::{SwapDevice, SwapError, SwapKind, active};
pub use target::{FileView, Mapping, TargetError};
pub use usage::{UsageError, counts_of};
pub use vmstat::{SwapCounters, VmstatError};
pub use zram::{ScopedZram, ZramError};
