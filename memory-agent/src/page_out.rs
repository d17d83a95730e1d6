//! Paging out, and making sure that it happened.

use std::io;
use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::memory::{FileView, Target, TargetError};
use crate::memory_group::{MemoryGroup, SwapLimit};
use crate::page_number::FilePage;
use crate::page_range::PageRanges;
use crate::page_state::PAGE_SIZE;
use crate::probe::{ProbeError, check_range, resident_runs, take_swap_cache};
use crate::swap::{self, SwapError};
use crate::sys;

/// Why nothing was paged out.
#[derive(Debug, Error)]
pub enum PageOutError {
    /// The host has no swap.
    #[error("nothing was paged out because no swap is active: set one up, such as zram, and enable it with swapon")]
    NoSwap,
    /// All swap is occupied.
    #[error("nothing was paged out because all {0} bytes of swap are occupied: add swap")]
    SwapFull(u64),
    /// A control group of the process, or one above it, may not use swap, or has used what it may.
    #[error(
        "nothing was paged out because the control group {} may use {} bytes of swap and uses {}: raise its memory.swap.max (systemd: MemorySwapMax, Kubernetes: the kubelet's memorySwap.swapBehavior)", .0.group.display(), .0.max, .0.used
    )]
    GroupSwapFull(SwapLimit),
    /// The kernel kept every page.
    #[error(
        "the kernel kept all {0} pages: they may be mapped by another process too, or locked (page out from the only process that maps them), or wait in the swap cache of a disk until their memory is needed, which kernels before 6.5 do not tell"
    )]
    Kept(u64),
    /// The states of the pages could not be found out.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The target is not what it was, or this user may not do it.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The swap devices could not be listed.
    #[error(transparent)]
    Swap(#[from] SwapError),
    /// A system call failed.
    #[error("{call} failed on pages {pages:?}: {cause}; check that the file is still mapped there, whole")]
    System {
        /// The call.
        call: &'static str,
        /// What it was asked for.
        pages: Range<u64>,
        /// The system's reason.
        cause: io::Error,
    },
}

/// What paging out did, in pages. `asked` is `swapped + left`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageOutReport {
    /// Pages that were resident when asked.
    pub asked: u64,
    /// Pages of these that are no longer resident: swapped, or holes again where a read had allocated a page that
    /// nobody wrote.
    pub swapped: u64,
    /// Pages of these that are still resident.
    pub left: u64,
    /// Pages of those left that wait in the swap cache, on hosts with swap that does not free at once: they have been written,
    /// or were read ahead. The kernel frees them when it needs the memory, without writing them again. Known from Linux 6.5 on.
    pub queued: u64,
    /// How often the kernel was asked, at most, for any of them.
    pub attempts: u32,
}

impl PageOutReport {
    /// Both together, as if it had been one call.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self {
            asked: self.asked + other.asked,
            swapped: self.swapped + other.swapped,
            left: self.left + other.left,
            queued: self.queued + other.queued,
            attempts: self.attempts.max(other.attempts),
        }
    }
}

/// How often pages that stay are asked for. The second time maps what was resident but not mapped; before the
/// third the batches of all CPUs are drained; the fourth is for pages that were in use at that moment.
const ATTEMPTS: u32 = 4;

/// How often the kernel is asked to free what it has written to swap, and how long that may take to be written.
const RECLAIM_ATTEMPTS: u32 = 3;
const WRITING: Duration = Duration::from_millis(10);

/// Ranges this near to one another are advised in one call if no page in between may be paged out by mistake.
const NEAR: u64 = 512;

/// Pages out the resident pages of the ranges (page numbers of the target, in any order), and looks whether it
/// happened.
///
/// Pages that are resident but not mapped here (brought in by `pread`, say) are mapped first, since
/// `MADV_PAGEOUT` walks page tables (mm/madvise.c `madvise_cold_or_pageout_pte_range`); holes are left alone. A page
/// that somebody discards at that very moment can be allocated by this, as zeros.
/// Pages that another process has mapped too stay, and are reported in [`PageOutReport::left`].
///
/// # Errors
/// [`PageOutError`] when there were resident pages and not a single one could be moved, or the pages are not in
/// the mapping.
pub fn page_out(target: &dyn Target, ranges: &[Range<u64>]) -> Result<PageOutReport, PageOutError> {
    page_out_by(target, ranges, Way::Mapped)
}

/// What paging out may do besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageOutOptions {
    /// Whether the kernel may be asked to free what is queued, by `memory.reclaim` of the process's control group. Which
    /// pages of the group it frees is up to the kernel: others, and those of other processes in the group, may be among them.
    pub reclaim_group: bool,
}

/// As [`page_out`], with options.
///
/// # Errors
/// As [`page_out`].
pub fn page_out_with(
    target: &dyn Target,
    ranges: &[Range<u64>],
    options: PageOutOptions,
) -> Result<PageOutReport, PageOutError> {
    let mut report = page_out(target, ranges)?;
    if options.reclaim_group && report.queued > 0 {
        let freed = free_queued(target, ranges, &report)?;
        report.queued -= freed;
        report.left -= freed;
        report.swapped += freed;
    }
    Ok(report)
}

impl FileView {
    /// Pages out resident pages that nobody else has mapped, such as those just read or written through the file.
    ///
    /// # Errors
    /// As [`page_out`], and when the pages cannot be mapped for it.
    pub fn page_out(&self, ranges: &[Range<FilePage>]) -> Result<PageOutReport, PageOutError> {
        let mapping = self.mapping();
        let own: Vec<_> = ranges.iter().map(|range| mapping.of_file(range)).collect();
        let report = page_out_by(&mapping, &own, Way::MapFirst);
        if !matches!(report, Err(PageOutError::Probe(ProbeError::OutOfRange { .. }))) {
            // What stays, because the owner wants it, is the owner's alone again.
            self.unmap(ranges)?;
        }
        report
    }
}

/// What is known of pages that are to be paged out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Most of them are mapped by whoever works with them.
    Mapped,
    /// Most of them are not, and are mapped first.
    MapFirst,
    /// They are mapped, and hold data: see [`Target::advise_restore`].
    Restore,
}

/// As [`page_out`], in another way the first time.
pub(crate) fn page_out_by(target: &dyn Target, ranges: &[Range<u64>], way: Way) -> Result<PageOutReport, PageOutError> {
    for range in ranges {
        check_range(target, range)?;
    }
    let ranges = PageRanges::from_unordered(ranges);
    let mut left = PageRanges::new();
    for range in &ranges {
        resident_runs(target, range, &mut left)?;
    }
    let mut report = PageOutReport { asked: left.page_count(), ..PageOutReport::default() };
    if report.asked == 0 {
        return Ok(report);
    }
    report.queued = take_queued(target, &mut left)?;
    if !left.is_empty() {
        if way == Way::MapFirst {
            for run in &left {
                target.map_pages(run)?;
            }
        }
        match way {
            // Each page of these is one that was seen to be resident.
            Way::Restore => target.advise_restore(&left)?,
            Way::Mapped | Way::MapFirst => target.advise_page_out(&spans(&left, &ranges))?,
        }
        report.attempts = 1;
    }
    loop {
        left = still_resident(target, &left)?;
        report.queued += take_queued(target, &mut left)?;
        if left.is_empty() || report.attempts == ATTEMPTS {
            break;
        }
        if left.page_count() == report.asked
            && let Some(error) = no_room(target.pid())?
        {
            // Asking again would take the CPUs' time for nothing.
            return Err(error);
        }
        if report.attempts == 2 {
            // Refused by some seccomp filters, and unknown without NUMA: then those pages stay.
            let _ = sys::drain_lru_batches();
        }
        for run in &left {
            target.map_pages(run)?;
        }
        target.advise_page_out(&left)?;
        report.attempts += 1;
    }
    report.left = left.page_count() + report.queued;
    report.swapped = report.asked - report.left;
    if report.swapped == 0 && report.queued == 0 {
        return Err(no_room(target.pid())?.unwrap_or(PageOutError::Kept(report.asked)));
    }
    Ok(report)
}

/// Joins near runs where all pages between them belong to the same range: walking over pages that are not mapped
/// costs less than another call.
fn spans(runs: &[Range<u64>], ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut ranges = ranges.iter();
    let mut range_end = 0;
    let mut spans: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match spans.last_mut() {
            Some(span) if run.end <= range_end && run.start - span.end <= NEAR => span.end = run.end,
            _ => {
                spans.push(run.clone());
                while range_end < run.end {
                    let Some(range) = ranges.next() else { break };
                    range_end = range.end;
                }
            }
        }
    }
    spans
}

/// Moves pages out of `left` that wait in the swap cache of swap that does not free at once, and tells how many: they were
/// written already, or read ahead and not changed since. The kernel frees them when it needs the memory; mapping them would
/// take their place in swap from them, and they would be written once more.
///
/// Where all swap frees at once, what is in the swap cache was read ahead, and goes once it is mapped.
fn take_queued(target: &dyn Target, left: &mut PageRanges) -> Result<u64, PageOutError> {
    if left.is_empty() || swap::all_frees_at_once()? {
        return Ok(0);
    }
    Ok(take_swap_cache(&target.mapping(), left)?.page_count())
}

fn still_resident(target: &dyn Target, runs: &PageRanges) -> Result<PageRanges, ProbeError> {
    let mut left = PageRanges::new();
    for run in runs {
        resident_runs(target, run, &mut left)?;
    }
    Ok(left)
}

/// Has the kernel free what has been written to swap and waits in the swap cache, where the process's control group offers
/// that; how many pages left memory.
fn free_queued(target: &dyn Target, ranges: &[Range<u64>], report: &PageOutReport) -> Result<u64, PageOutError> {
    let Some(group) = MemoryGroup::of_process(target.pid()).filter(MemoryGroup::can_reclaim) else { return Ok(0) };
    let ranges = PageRanges::from_unordered(ranges);
    let mut freed = 0;
    for attempt in 0..RECLAIM_ATTEMPTS {
        if attempt > 0 {
            // What is still being written cannot be freed.
            std::thread::sleep(WRITING);
        }
        // Without the right to, the pages stay until the kernel needs the memory: as without this file.
        if group.reclaim((report.queued - freed) * PAGE_SIZE).is_err() {
            break;
        }
        let stay = still_resident(target, &ranges)?.page_count();
        freed = report.left.saturating_sub(stay).min(report.queued);
        if freed == report.queued {
            break;
        }
    }
    Ok(freed)
}

/// Why no more of a process's memory can be paged out: the host has no swap, or no room in it, or the process's control groups
/// leave none; `None` when there is room.
///
/// # Errors
/// When the swap devices cannot be listed.
pub fn no_room(pid: u32) -> Result<Option<PageOutError>, SwapError> {
    let devices = swap::active()?;
    if devices.is_empty() {
        return Ok(Some(PageOutError::NoSwap));
    }
    if devices.iter().all(|device| device.free_bytes() == 0) {
        return Ok(Some(PageOutError::SwapFull(devices.iter().map(|device| device.size_bytes).sum())));
    }
    let limit = MemoryGroup::of_process(pid).and_then(|group| group.swap_limit());
    Ok(limit.filter(|limit| limit.room() < PAGE_SIZE).map(PageOutError::GroupSwapFull))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]
    fn near_runs_join_only_within_a_range() {
        assert_eq!(spans(&[0..2, 4..6, 600..700], &[0..800]), [0..6, 600..700]);
        assert_eq!(spans(&[0..2, 4..6], &[0..3, 4..8]), [0..2, 4..6]);
        assert_eq!(spans(&[1..2, 5..6, 8..9], &[0..3, 4..9]), [1..2, 5..9]);
    }
}
