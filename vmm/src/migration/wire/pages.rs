//! Page batches: which pages, by which lane, and their bytes.
//!
//! Payload: lane (1 byte), 3 bytes zero, number of runs (4 bytes), then for each run its first page (8 bytes) and its
//! number of pages (4 bytes), 4 bytes zero, then the pages' bytes in that order. All little-endian.

use std::ops::Range;

use memory_agent::{PAGE_SIZE, PageNumber, PageRange};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MAX_BATCH_PAGES, WireError};
use crate::ram::RamPage;

/// How a page travels, and so how it is kept at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Warm: stays in memory.
    Hot,
    /// Was swapped at the source: is paged out again once it has landed.
    Cold,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct BatchHeader {
    lane: u8,
    zero: [u8; 3],
    runs: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct WireRun {
    first: U64,
    pages: U32,
    zero: U32,
}

/// The longest payload: as many runs as pages.
pub(super) const MAX_PAYLOAD: usize =
    size_of::<BatchHeader>() + MAX_BATCH_PAGES * (size_of::<WireRun>() + PAGE_SIZE as usize);

/// A batch that was received and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBatch {
    /// How the pages travel.
    pub lane: Lane,
    /// Which pages, and where in the payload their bytes are.
    pub runs: Vec<(Range<RamPage>, Range<usize>)>,
}

impl PageBatch {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|(run, _)| run.page_count()).sum()
    }
}

/// Writes a batch's payload and gives its CRC-32: `fill` puts the bytes of one page where they belong. Each page is
/// summed right after it is filled, while it is in the processor's nearest cache.
///
/// # Errors
/// Those of `fill`.
pub fn encode<E>(
    lane: Lane,
    runs: &[Range<RamPage>],
    payload: &mut Vec<u8>,
    mut fill: impl FnMut(RamPage, &mut [u8]) -> Result<(), E>,
) -> Result<u32, E> {
    let table = size_of::<BatchHeader>() + runs.len() * size_of::<WireRun>();
    let pages: u64 = runs.iter().map(PageRange::page_count).sum();
    // What is in the buffer from the last batch is written over, not cleared first.
    payload.resize(table + (pages * PAGE_SIZE) as usize, 0);
    let mut head = &mut payload[..table];
    let mut put = |bytes: &[u8]| {
        let (place, rest) = std::mem::take(&mut head).split_at_mut(bytes.len());
        place.copy_from_slice(bytes);
        head = rest;
    };
    put(BatchHeader { lane: lane as u8, zero: [0; 3], runs: U32::new(runs.len() as u32) }.as_bytes());
    for run in runs {
        let pages = U32::new(run.page_count() as u32);
        put(WireRun { first: U64::new(run.start.number()), pages, zero: U32::ZERO }.as_bytes());
    }
    let mut sum = crc32fast::Hasher::new();
    let (head, data) = payload.split_at_mut(table);
    sum.update(head);
    for (page, place) in runs.iter().flat_map(PageRange::pages).zip(data.chunks_mut(PAGE_SIZE as usize)) {
        fill(page, place)?;
        sum.update(place);
    }
    Ok(sum.finalize())
}

/// Reads a batch's payload for a machine of `ram_pages` pages.
///
/// # Errors
/// When it is not a batch, or has pages that the machine does not have.
pub fn decode(payload: &[u8], ram_pages: u64, sequence: u32) -> Result<PageBatch, WireError> {
    let wrong = |why: String| WireError::Payload { sequence, why };
    let (header, rest) =
        BatchHeader::read_from_prefix(payload).map_err(|_| wrong("a page batch without a header".into()))?;
    let lane = match header.lane {
        0 => Lane::Hot,
        1 => Lane::Cold,
        other => return Err(wrong(format!("lane {other} does not exist"))),
    };
    let count = header.runs.get() as usize;
    if count > MAX_BATCH_PAGES {
        return Err(wrong(format!("{count} runs of pages, {MAX_BATCH_PAGES} are possible")));
    }
    let (wire_runs, bytes) = <[WireRun]>::ref_from_prefix_with_elems(rest, count)
        .map_err(|_| wrong("a page batch shorter than its runs".into()))?;
    if header.zero != [0; 3] || wire_runs.iter().any(|run| run.zero != U32::ZERO) {
        return Err(wrong("a page batch that says what this version does not know".into()));
    }
    let mut runs = Vec::with_capacity(count);
    let mut at = payload.len() - bytes.len();
    for run in wire_runs {
        let (first, pages) = (run.first.get(), u64::from(run.pages.get()));
        let end = first.checked_add(pages).filter(|end| pages > 0 && *end <= ram_pages);
        let end = end.ok_or_else(|| wrong(format!("{pages} pages from page {first} on, of {ram_pages}")))?;
        let next = usize::try_from(pages * PAGE_SIZE).ok().map(|length| at + length);
        let next = next.filter(|next| *next <= payload.len());
        let next = next.ok_or_else(|| wrong("a page batch shorter than its pages".into()))?;
        runs.push((RamPage::range(first..end), at..next));
        at = next;
    }
    if at != payload.len() {
        return Err(wrong(format!("{} bytes behind the last page", payload.len() - at)));
    }
    Ok(PageBatch { lane, runs })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    fn batch(lane: Lane, runs: &[Range<RamPage>]) -> Vec<u8> {
        let mut payload = Vec::new();
        let sum = encode(lane, runs, &mut payload, |page, bytes| {
            bytes.fill(page.number() as u8);
            Ok::<_, Infallible>(())
        });
        assert_eq!(sum, Ok(crc32fast::hash(&payload)));
        payload
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(cold: bool, starts in prop::collection::vec((0u64..1000, 1u64..4), 0..12)) {
            let lane = if cold { Lane::Cold } else { Lane::Hot };
            let runs: Vec<_> = starts.into_iter().map(|(start, length)| RamPage(start).run(length)).collect();
            let payload = batch(lane, &runs);
            prop_assert!(payload.len() <= MAX_PAYLOAD);
            let decoded = decode(&payload, 1004, 0).unwrap();
            prop_assert_eq!(decoded.lane, lane);
            prop_assert_eq!(decoded.runs.len(), runs.len());
            for ((run, bytes), expected) in decoded.runs.iter().zip(&runs) {
                prop_assert_eq!(run, expected);
                for (page, bytes) in run.pages().zip(payload[bytes.clone()].chunks(PAGE_SIZE as usize)) {
                    prop_assert!(bytes.iter().all(|b| *b == page.number() as u8));
                }
            }
        }

        #[test]
        fn no_bytes_make_it_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&payload, 1000, 0);
        }
    }

    #[test]
    fn pages_behind_the_end_are_refused() {
        let payload = batch(Lane::Hot, &[RamPage(998).run(3)]);
        assert!(decode(&payload, 1001, 0).is_ok());
        assert!(matches!(decode(&payload, 1000, 3), Err(WireError::Payload { sequence: 3, .. })));
        let payload = batch(Lane::Hot, &[RamPage(0).run(2)]);
        assert!(decode(&payload, 1000, 0).is_ok());
        for reserved in [1, 3, 20, 23] {
            let mut payload = payload.clone();
            payload[reserved] = 1;
            assert!(decode(&payload, 1000, 0).is_err(), "byte {reserved}");
        }
        assert!(decode(&payload[..payload.len() - 1], 1000, 0).is_err());
        assert!(decode(&[payload, vec![0]].concat(), 1000, 0).is_err());
    }
}
