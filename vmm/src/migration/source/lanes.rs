//! The two lanes: how pages get from guest RAM onto the wire.

use std::ops::Range;

use memory_agent::{PAGE_SIZE, PageNumber, PageOutError, PageRange, PageState, is_zero};

use super::SourceError;
use super::session::Session;
use crate::migration::wire::frame::Kind;
use crate::migration::wire::message::send_ranges;
use crate::migration::wire::{Lane, MAX_BATCH_PAGES, Message, pages};
use crate::ram::{RamPage, RamSnapshot};

const PAGE: usize = PAGE_SIZE as usize;

impl Session<'_> {
    /// Sends everything the hot lane owes. Pages that turn out to be swapped go to the cold lane, unless `all` are to
    /// be sent now.
    pub(super) fn send_hot_lane(&mut self, all: bool) -> Result<(), SourceError> {
        let mut from = RamPage(0);
        let mut zeros = Vec::new();
        loop {
            let runs = self.delivery.plan.next_hot(from, MAX_BATCH_PAGES as u64);
            let Some(last) = runs.last() else { break };
            from = last.end;
            self.peer.check_cancelled()?;
            let mut snapshot = self.ram().snapshot(&runs)?;
            let mut send = Vec::new();
            for run in snapshot.runs() {
                match run.state {
                    PageState::Hole => zeros.push(self.delivery.hole(run.pages)),
                    PageState::Resident => send.push(run.pages),
                    PageState::Swapped => {
                        self.delivery.found_swapped(run.pages.clone());
                        // The policy may have left it in this lane.
                        if all || self.delivery.plan.owes_hot(run.pages.start) {
                            send.push(run.pages);
                        }
                    }
                }
            }
            // What is read of swapped pages in this lane is wanted resident: by the policy, or because time presses.
            runs.into_iter().for_each(|run| snapshot.keep(run));
            self.send_batch(Lane::Hot, &send, &mut zeros)?;
            restore_residency(snapshot)?;
            self.show();
        }
        self.send_zeros(zeros)
    }

    /// Sends everything the cold lane owes, a window at a time, and pages each window out again before the next.
    pub(super) fn send_cold_lane(&mut self) -> Result<(), SourceError> {
        let window = self.options.window.pages().max(1);
        loop {
            let runs = self.delivery.plan.next_cold(window);
            if runs.is_empty() {
                break;
            }
            let snapshot = self.ram().snapshot_swapped(&runs)?;
            let mut zeros = Vec::new();
            let mut batch = Vec::new();
            let mut room = MAX_BATCH_PAGES as u64;
            for run in snapshot.runs() {
                match run.state {
                    PageState::Hole => zeros.push(self.delivery.hole(run.pages)),
                    PageState::Resident => self.delivery.plan.found_resident(run.pages),
                    PageState::Swapped => {
                        let mut rest = run.pages;
                        while !rest.is_empty() {
                            let some = rest.intersection(&rest.start.run(room));
                            room -= some.page_count();
                            rest.start = some.end;
                            batch.push(some);
                            if room == 0 {
                                self.peer.check_cancelled()?;
                                self.send_batch(Lane::Cold, &std::mem::take(&mut batch), &mut zeros)?;
                                room = MAX_BATCH_PAGES as u64;
                                self.show();
                            }
                        }
                    }
                }
            }
            self.send_batch(Lane::Cold, &batch, &mut zeros)?;
            self.figures.look(self.guest.ram())?;
            restore_residency(snapshot)?;
            self.send_zeros(zeros)?;
            self.show();
        }
        // What was swapped in since the plan was made.
        if self.delivery.plan.owed().hot > 0 { self.send_hot_lane(false) } else { Ok(()) }
    }

    /// Reads the pages and sends those that have something in them; those that have not are added to `zeros`.
    fn send_batch(
        &mut self,
        lane: Lane,
        runs: &[Range<RamPage>],
        zeros: &mut Vec<Range<RamPage>>,
    ) -> Result<(), SourceError> {
        if runs.is_empty() {
            return Ok(());
        }
        let ram = self.ram();
        let mut payload = std::mem::take(&mut self.payload);
        let mut sum = pages::encode(lane, runs, &mut payload, |page, bytes| match lane {
            Lane::Hot => ram.read_pages(page.run(1), bytes),
            Lane::Cold => ram.read_swapped(page.run(1), bytes),
        })?;
        let data = payload.len() - runs.iter().map(|r| r.page_count() as usize * PAGE).sum::<usize>();
        let (full, empty) = split_empty(runs, &payload[data..]);
        if !empty.is_empty() {
            let read = payload[data..].to_vec();
            let mut pages = runs.iter().flat_map(PageRange::pages).zip(read.chunks(PAGE));
            sum = pages::encode(lane, &full, &mut payload, |page, bytes| {
                if let Some((_, content)) = pages.by_ref().find(|(p, _)| *p == page) {
                    bytes.copy_from_slice(content);
                }
                Ok::<_, SourceError>(())
            })?;
        }
        if !full.is_empty() {
            self.peer.writer.write_summed(Kind::Pages, &payload, sum)?;
        }
        self.payload = payload;
        full.into_iter().for_each(|run| self.delivery.sent(run));
        zeros.extend(empty.into_iter().map(|run| self.delivery.empty(run)));
        Ok(())
    }

    /// Tells the destination that these pages, which are counted and off the plan, read as zeros.
    pub(super) fn send_zeros(&mut self, mut ranges: Vec<Range<RamPage>>) -> Result<(), SourceError> {
        if ranges.is_empty() {
            return Ok(());
        }
        // Of one batch, holes were found before pages with nothing in them.
        ranges.sort_unstable_by_key(|range| range.start);
        Ok(send_ranges(&ranges, &mut self.peer.writer, |ranges, _| Message::Zeros(ranges))?)
    }
}

/// Pages out again what was read.
fn restore_residency(snapshot: RamSnapshot<'_>) -> Result<(), SourceError> {
    let Err(e) = snapshot.restore_residency() else { return Ok(()) };
    match e.page_out() {
        // The guest has swapped every one of them in meanwhile, and wants them.
        Some(PageOutError::Kept(_)) => Ok(()),
        // Whoever took swap away has everything resident.
        Some(e @ (PageOutError::NoSwap | PageOutError::GroupSwapFull(_))) => {
            tracing::warn!("what was cold is resident here: {e}");
            Ok(())
        }
        _ => Err(e.into()),
    }
}

/// Splits runs whose bytes are in `bytes` into those with something in them and those with nothing but zeros.
fn split_empty(runs: &[Range<RamPage>], bytes: &[u8]) -> (Vec<Range<RamPage>>, Vec<Range<RamPage>>) {
    let (mut full, mut empty) = (Vec::new(), Vec::new());
    for (page, bytes) in runs.iter().flat_map(PageRange::pages).zip(bytes.chunks(PAGE)) {
        let list: &mut Vec<Range<RamPage>> = if is_zero(bytes) { &mut empty } else { &mut full };
        match list.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => list.push(page.run(1)),
        }
    }
    (full, empty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_pages_are_told_from_full_ones() {
        let mut bytes = vec![0; 4 * PAGE];
        bytes[PAGE + 4095] = 1;
        bytes[3 * PAGE] = 1;
        let (full, empty) = split_empty(&[RamPage(10).run(2), RamPage(20).run(2)], &bytes);
        assert_eq!(full, [RamPage(11).run(1), RamPage(21).run(1)]);
        assert_eq!(empty, [RamPage(10).run(1), RamPage(20).run(1)]);
    }

    #[test]
    fn adjacent_runs_are_joined() {
        let (full, empty) = split_empty(&[RamPage(0).run(1), RamPage(1).run(1)], &vec![1; 2 * PAGE]);
        assert_eq!(full, [RamPage(0).run(2)]);
        assert!(empty.is_empty());
    }
}
