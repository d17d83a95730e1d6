//! Which pages are in memory, in runs.

use std::ops::Range;

use super::ProbeError;
use crate::page_state::PAGE_SIZE;
use crate::sys;
use crate::target::Mapping;

/// Pages asked about at a time: one page of answers, and some 500 us at most between a page's look and the
/// next step of whoever asked.
pub(super) const CHUNK: usize = 4096;

/// Asks `mincore` about at most [`CHUNK`] pages from `pages.start` on, and calls `each` with every run and
/// whether it is in memory. Returns the first page not asked about.
pub(super) fn chunk(
    mapping: &Mapping<'_>,
    pages: Range<u64>,
    mut each: impl FnMut(Range<u64>, bool) -> Result<(), ProbeError>,
) -> Result<u64, ProbeError> {
    let mut vector = [0; CHUNK];
    let end = pages.end.min(pages.start + CHUNK as u64);
    let vector = &mut vector[..(end - pages.start) as usize];
    let (address, _) = mapping.bytes(&pages);
    sys::mincore(address, PAGE_SIZE as usize, vector).map_err(|source| ProbeError::System {
        call: "mincore",
        pages: pages.start..end,
        source,
    })?;
    let mut page = pages.start;
    // Only the lowest bit is defined.
    for run in vector.chunk_by(|a, b| (a ^ b) & 1 == 0) {
        let next = page + run.len() as u64;
        each(page..next, run[0] & 1 == 1)?;
        page = next;
    }
    Ok(end)
}

/// Appends the runs of pages of the range that are in memory to `runs`.
pub(crate) fn resident_runs(
    mapping: &Mapping<'_>,
    pages: &Range<u64>,
    runs: &mut Vec<Range<u64>>,
) -> Result<(), ProbeError> {
    let own = runs.len();
    let mut page = pages.start;
    while page < pages.end {
        page = chunk(mapping, page..pages.end, |run, resident| {
            if resident {
                match runs[own..].last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run),
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}
