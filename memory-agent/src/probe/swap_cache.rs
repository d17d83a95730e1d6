//! Pages in memory that wait in the swap cache: written to a device that does not free at once, or read ahead with a
//! neighbour and not wanted by anybody yet (mm/swap_state.c `swap_cluster_readahead`).

use std::ops::Range;

use super::ProbeError;
use crate::memory::Mapping;
use crate::page_range::{PageRange, PageRanges};
use crate::sys::{self, Cachestat};

/// Moves those of the resident `runs` that are in the swap cache out of them, and returns them. Where the kernel has no
/// `cachestat`, none is.
pub(crate) fn take_swap_cache(mapping: &Mapping<'_>, runs: &mut PageRanges) -> Result<PageRanges, ProbeError> {
    let (mut kept, mut taken) = (PageRanges::new(), PageRanges::new());
    let mut todo: Vec<_> = std::mem::take(runs).into_iter().rev().collect();
    while let Some(run) = todo.pop() {
        let length = run.page_count();
        match evicted(mapping, &run)? {
            0 => kept.push(run),
            // What the page cache has a swap entry for is in memory all the same.
            evicted if evicted == length => taken.push(run),
            _ => {
                let middle = run.start + length / 2;
                todo.push(middle..run.end);
                todo.push(run.start..middle);
            }
        }
    }
    *runs = kept;
    Ok(taken)
}

/// Pages whose entry in the page cache is a swap entry, wherever they are; 0 where the kernel does not tell.
pub(crate) fn evicted(mapping: &Mapping<'_>, pages: &Range<u64>) -> Result<u64, ProbeError> {
    Ok(cachestat(mapping, pages)?.map_or(0, |counts| counts.evicted))
}

/// What `cachestat` counts of pages; `None` where the kernel does not tell.
pub(super) fn cachestat(mapping: &Mapping<'_>, pages: &Range<u64>) -> Result<Option<Cachestat>, ProbeError> {
    let length = pages.byte_count();
    if length == 0 {
        // A length of 0 would mean up to the end of the file.
        return Ok(Some(Cachestat::default()));
    }
    let counts = sys::cachestat(mapping.fd(), mapping.offset(pages.start), length);
    counts.map_err(|cause| ProbeError::System { call: "cachestat", pages: pages.clone(), cause })
}
