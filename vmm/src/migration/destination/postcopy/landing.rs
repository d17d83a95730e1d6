//! Where a page that has come is put, once, and what a fault on one that has not leads to.
//!
//! A page is landed or missing by itself, whatever becomes of those that came with it: one that has landed is the guest's, who may
//! have written it, and never lands again. One that the host has no memory for stays with whoever received it, who tries again;
//! when the connection ends before that, it is missing, and comes over the next one.

use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Instant;

use memory_agent::{PAGE_SIZE, PageNumber, PageRange};
use rustix::event::{PollFd, PollFlags};

use super::{AGAIN_AFTER, LONGEST_US, PostCopy, State};
use crate::host::adaptive_poll::sleep;
use crate::log_limit::LogLimit;
use crate::migration::destination::DestinationError;
use crate::migration::link::Link;
use crate::migration::plan::Fault;
use crate::migration::wire::message::{Incoming, receive as receive_frame};
use crate::migration::wire::{FrameReader, Lane, Message, PageBatch, WireError};
use crate::ram::{NotLanded, RamError, RamPage};

/// So many landed pages are confirmed together, or as many as there are after a while: each confirmation takes both sides'
/// CPUs, and the guest waits for none.
const CONFIRMED_AT_ONCE: u64 = 64;

/// Pages that have arrived and are to land.
struct Fresh {
    run: Range<RamPage>,
    /// Where in the payload they begin.
    at: usize,
    /// Whether this is one page, which the guest waits for.
    requested: bool,
}

/// Pages of a batch that have not landed.
pub(super) struct Unlanded {
    lane: Lane,
    fresh: Vec<Fresh>,
    why: RamError,
}

impl Unlanded {
    pub(super) fn why(&self) -> &RamError {
        &self.why
    }
}

impl PostCopy {
    /// Handles one page that the guest waits for. What fails here can be tried again.
    pub(super) fn fault(&self, page: RamPage) -> Result<(), RamError> {
        let mut state = self.lock();
        match state.missing.fault(page) {
            Fault::Wait => Ok(()),
            Fault::Ask => {
                self.fault_priority.take();
                state.since.insert(page, Instant::now());
                if let Some(writer) = &mut state.asks
                    && let Err(e) = Message::PageRequest(vec![page.run(1)]).send(writer)
                {
                    // It is asked for again on the next connection.
                    tracing::debug!("page {page} could not be asked for: {e}");
                    state.asks = None;
                }
                Ok(())
            }
            Fault::Wake => {
                drop(state);
                self.pages.wake(page.run(1))
            }
            Fault::Fill => {
                drop(state);
                self.pages.zero(page)?;
                self.lock().holes += 1;
                Ok(())
            }
        }
    }

    /// Puts pages that have come where they belong, once, and wakes whoever waits.
    pub(super) fn land(&self, batch: &PageBatch, payload: &[u8]) -> Result<(), Unlanded> {
        let fresh = self.lock().fresh(batch);
        self.land_fresh(batch.lane, fresh, payload)
    }

    /// Tries once more what could not land.
    pub(super) fn land_again(&self, unlanded: Unlanded, payload: &[u8]) -> Result<(), Unlanded> {
        self.land_fresh(unlanded.lane, unlanded.fresh, payload)
    }

    /// What could not land is missing again, to come over another connection.
    pub(super) fn not_landed(&self, unlanded: Unlanded) {
        let mut state = self.lock();
        unlanded.fresh.into_iter().for_each(|fresh| state.missing.failed(fresh.run));
    }

    fn land_fresh(&self, lane: Lane, fresh: Vec<Fresh>, payload: &[u8]) -> Result<(), Unlanded> {
        let (mut landed, mut left, mut reason) = (Vec::new(), Vec::new(), None);
        for Fresh { run, at, requested } in fresh {
            let data = &payload[at..at + bytes_of(&run)];
            // In the guest's page table, which it is about to look into, or nowhere but in memory, from where it can be paged
            // out unless the guest touches it.
            let put = if requested { self.pages.fill(run.start, data) } else { self.pages.land(run.start, data) };
            let end = match put {
                Ok(()) => run.end,
                Err(NotLanded { landed, why }) => {
                    reason = Some(why);
                    run.end.min(run.start + landed)
                }
            };
            if end > run.start {
                self.has_landed(run.start..end);
                landed.push(run.start..end);
            }
            if end < run.end {
                left.push(Fresh { at: at + bytes_of(&(run.start..end)), run: end..run.end, requested });
            }
        }
        if lane == Lane::Cold
            && let Some(cold) = &self.lock().cold
        {
            // What the guest waits for stays, its neighbours go with the next window. Should that thread have ended, they stay in
            // memory, whole.
            let _ = cold.send(landed);
        }
        match reason {
            Some(why) if !left.is_empty() => Err(Unlanded { lane, fresh: left, why }),
            _ => Ok(()),
        }
    }

    /// Takes note of pages that are where they belong, and wakes whoever waits for them.
    fn has_landed(&self, run: Range<RamPage>) {
        let mut state = self.lock();
        if !state.missing.landed(run.clone()) {
            return;
        }
        // After it is known to have landed: who faults from here on finds it.
        if let Err(e) = self.pages.wake(run.clone()) {
            // The kernel refuses no such call on memory of ours.
            tracing::error!("whoever waits for pages {run:?} could not be woken: {e}");
        }
        for page in run.pages() {
            if let Some(since) = state.since.remove(&page) {
                let waited = since.elapsed().as_micros() as u64;
                // Longer ones count as the longest.
                let _ = state.waits_us.record(waited.clamp(1, LONGEST_US));
            }
        }
    }

    /// Lands what comes over the bulk channel until the source has said that this was all, or the connection ends.
    pub(super) fn receive(&self, reader: &mut FrameReader<Link>) -> Result<(), DestinationError> {
        let mut payload = Vec::new();
        loop {
            match receive_frame(reader, &mut payload, self.ram.pages())? {
                Incoming::Pages(batch) => {
                    self.fault_priority.give_way();
                    if let Err(unlanded) = self.land(&batch, &payload) {
                        self.land_patiently(unlanded, &payload, reader.link())?;
                    }
                    let mut state = self.lock();
                    if state.missing.unconfirmed() >= CONFIRMED_AT_ONCE || state.missing.left() == 0 {
                        state.confirm()?;
                    }
                }
                Incoming::Message(Message::PostCopyEnd) => match self.lock().missing.left() {
                    0 => return Ok(()),
                    left => return Err(DestinationError::Incomplete(left)),
                },
                Incoming::Message(other) => {
                    return Err(WireError::Unexpected { found: other.name(), expected: "pages" }.into());
                }
            }
        }
    }

    /// Tries what could not land again and again, until it has or the connection ends.
    fn land_patiently(&self, mut unlanded: Unlanded, payload: &[u8], link: &Link) -> Result<(), DestinationError> {
        let mut complaint = LogLimit::default();
        loop {
            if complaint.is_due() {
                tracing::warn!("pages of the guest cannot land, and are tried again: {}", unlanded.why());
            }
            match wait_for_end(link) {
                Ok(false) => {}
                ended => {
                    self.not_landed(unlanded);
                    return Err(ended.map_or_else(WireError::from, |_| WireError::Closed).into());
                }
            }
            match self.land_again(unlanded, payload) {
                Ok(()) => return Ok(()),
                Err(again) => unlanded = again,
            }
        }
    }
}

/// Waits a while, or until the connection has ended; whether it has.
fn wait_for_end(link: &Link) -> std::io::Result<bool> {
    sleep(&mut [PollFd::from_borrowed_fd(link.as_fd(), PollFlags::RDHUP)], Some(AGAIN_AFTER))
}

impl State {
    /// What of a batch is to land.
    fn fresh(&mut self, batch: &PageBatch) -> Vec<Fresh> {
        let mut all: Vec<Fresh> = Vec::new();
        for (run, bytes) in &batch.runs {
            for (page, at) in run.pages().zip((bytes.start..).step_by(PAGE_SIZE as usize)) {
                if !self.missing.arrived(page) {
                    continue;
                }
                let requested = batch.lane == Lane::Hot && self.since.contains_key(&page);
                match all.last_mut() {
                    Some(last)
                        if last.run.end == page
                            && at == last.at + bytes_of(&last.run)
                            && !(requested || last.requested) =>
                    {
                        last.run.end += 1;
                    }
                    _ => all.push(Fresh { run: page.run(1), at, requested }),
                }
            }
        }
        all
    }
}

fn bytes_of(run: &Range<RamPage>) -> usize {
    run.byte_count() as usize
}
