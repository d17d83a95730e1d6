//! The tail: what comes after the guest, which runs here already.
//!
//! Whoever touches a page that has not landed waits, and the source is asked for it over a channel of its own; all other
//! pages come as the source sends them. A page lands once: what the guest has written since is never overwritten. Without a
//! connection those vCPUs wait that need a page, and the others run; when the source does not come back, the guest stands.

mod faults;
mod receiver;
mod threads;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hdrhistogram::Histogram;
use memory_agent::PAGE_SIZE;
use serde::{Deserialize, Serialize};

pub(super) use receiver::Receiver;

use super::DestinationError;
use crate::migration::link::Link;
use crate::migration::plan::{Fault, Missing};
use crate::migration::precedence::Precedence;
use crate::migration::progress::FaultFigures;
use crate::migration::rendezvous::Rendezvous;
use crate::migration::wire::message::{Incoming, receive as receive_frame, send_ranges};
use crate::migration::wire::{FrameReader, FrameWriter, Lane, Message, PageBatch, WireError};
use crate::ram::{GuestRam, MissingRam, RamError};

/// The longest wait that is told apart, microseconds.
const LONGEST_US: u64 = 3_600_000_000;
/// So many landed pages are confirmed together, or as many as there are after a while: each confirmation takes both sides'
/// CPUs, and the guest waits for none.
const CONFIRMED_AT_ONCE: u64 = 64;
/// Ranges of missing pages that are shown.
const SHOWN_RANGES: usize = 8;

/// What is still to come, for people and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TailStatus {
    /// Pages that have not come.
    pub missing: u64,
    /// The first of them, as first page and number of pages.
    pub first_missing: Vec<(u64, u64)>,
    /// Pages of them that the guest waits for.
    pub waited_for: u64,
    /// Whether the source is there.
    pub connected: bool,
    /// Whether the guest was stopped because the source has not come back.
    pub source_lost: bool,
    /// How long the guest waited for pages so far.
    pub faults: FaultFigures,
}

struct State {
    missing: Missing,
    /// When the guest began to wait for a page.
    since: HashMap<u64, Instant>,
    waits_us: Histogram<u32>,
    holes: u64,
    /// Where pages are asked for, while there is a connection.
    asks: Option<FrameWriter<Link>>,
    /// Where landed pages are confirmed, once the guest is ours.
    confirms: Option<FrameWriter<Link>>,
    /// Takes cold pages that have landed to the thread that pages them out: a page that the guest waits for does not wait for
    /// that.
    cold: Option<Sender<Vec<Range<u64>>>>,
    source_lost: bool,
}

/// The destination's side of a tail.
pub struct Tail {
    ram: Arc<GuestRam>,
    rendezvous: Arc<Rendezvous>,
    state: Mutex<State>,
    /// Of the guest, over whoever lands and pages out what it does not wait for.
    precedence: Precedence,
    /// The guest has ended or is to: nothing is needed any more.
    ended: AtomicBool,
}

impl std::fmt::Debug for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tail").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Tail {
    /// What is still to come.
    pub fn status(&self) -> TailStatus {
        let state = self.lock();
        let missing = &state.missing;
        TailStatus {
            missing: missing.left(),
            first_missing: missing.ranges().take(SHOWN_RANGES).map(|r| (r.start, r.end - r.start)).collect(),
            waited_for: missing.wanted(),
            connected: state.asks.is_some(),
            source_lost: state.source_lost,
            faults: state.figures(),
        }
    }

    /// All pages that have not come.
    pub fn missing(&self) -> Vec<Range<u64>> {
        self.lock().missing.ranges().collect()
    }

    /// Where the two sides meet again.
    pub fn rendezvous(&self) -> &Arc<Rendezvous> {
        &self.rendezvous
    }

    /// The guest has ended: tells the source that nothing is needed any more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(writer) = &mut self.lock().confirms {
            // A source that is away tries to come back, and finds nobody.
            let _ = Message::Ended.send(writer);
        }
        self.rendezvous.close();
    }

    /// Handles one page that the guest waits for.
    fn fault(&self, ram: &MissingRam, page: u64) -> Result<(), RamError> {
        let mut state = self.lock();
        match state.missing.fault(page) {
            Fault::Wait => Ok(()),
            Fault::Ask => {
                self.precedence.take();
                state.since.insert(page, Instant::now());
                if let Some(writer) = &mut state.asks
                    && let Err(e) = Message::Want(vec![page..page + 1]).send(writer)
                {
                    // It is asked for again on the next connection.
                    tracing::debug!("page {page} could not be asked for: {e}");
                    state.asks = None;
                }
                Ok(())
            }
            Fault::Fill => {
                state.holes += 1;
                drop(state);
                ram.zero(page)
            }
        }
    }

    /// Puts pages that have come where they belong, once, and wakes whoever waits.
    fn land(&self, ram: &MissingRam, batch: PageBatch, payload: &[u8]) -> Result<(), DestinationError> {
        let fresh = self.lock().fresh(&batch);
        if let Err(e) = fresh.iter().try_for_each(|fresh| self.put(ram, fresh, payload)) {
            let mut state = self.lock();
            fresh.into_iter().flat_map(|fresh| fresh.run).for_each(|page| state.missing.failed(page));
            return Err(e.into());
        }
        let mut state = self.lock();
        for Fresh { run, .. } in &fresh {
            if !state.missing.landed(run.clone()) {
                continue;
            }
            // After it is known to have landed: who faults from here on finds it.
            ram.wake(run.clone())?;
            for page in run.clone() {
                if let Some(since) = state.since.remove(&page) {
                    let waited = since.elapsed().as_micros() as u64;
                    // Longer ones count as the longest.
                    let _ = state.waits_us.record(waited.clamp(1, LONGEST_US));
                }
            }
        }
        if batch.lane == Lane::Cold {
            // What the guest waits for stays, its neighbours go with the next window.
            let runs = fresh.into_iter().map(|fresh| fresh.run).collect();
            if let Some(cold) = &state.cold {
                // Should that thread have ended, they stay in memory, whole.
                let _ = cold.send(runs);
            }
        }
        Ok(())
    }

    /// Puts pages where they belong.
    fn put(&self, ram: &MissingRam, Fresh { run, at, wanted }: &Fresh, payload: &[u8]) -> Result<(), RamError> {
        let data = &payload[*at..*at + bytes_of(run)];
        // In the guest's page table, which it is about to look into, or nowhere but in memory, from where it goes to sleep
        // unless the guest wakes it.
        match if *wanted { ram.fill(run.start, data) } else { self.ram.land_pages(run.start, data) } {
            // Where something is already, the guest may have written it.
            Err(e) if *wanted && !e.is_there_already() => {
                tracing::debug!("page {} goes another way: {e}", run.start);
                self.ram.land_pages(run.start, data)
            }
            done => done,
        }
    }

    /// Lands what comes over the bulk channel until the source has said that this was all, or the connection ends.
    fn receive(&self, ram: &MissingRam, reader: &mut FrameReader<Link>) -> Result<(), DestinationError> {
        let mut payload = Vec::new();
        loop {
            match receive_frame(reader, &mut payload, self.ram.pages())? {
                Incoming::Pages(batch) => {
                    self.precedence.give_way();
                    self.land(ram, batch, &payload)?;
                    let mut state = self.lock();
                    if state.missing.unconfirmed() >= CONFIRMED_AT_ONCE || state.missing.left() == 0 {
                        state.confirm()?;
                    }
                }
                Incoming::Message(Message::TailEnd) => match self.lock().missing.left() {
                    0 => return Ok(()),
                    left => return Err(DestinationError::Incomplete(left)),
                },
                Incoming::Message(other) => {
                    return Err(WireError::Unexpected { found: other.name(), expected: "pages" }.into());
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pages that have arrived and are to land.
struct Fresh {
    run: Range<u64>,
    /// Where in the payload they begin.
    at: usize,
    /// Whether this is one page, which the guest waits for.
    wanted: bool,
}

impl State {
    /// What of a batch is to land.
    fn fresh(&mut self, batch: &PageBatch) -> Vec<Fresh> {
        let mut all: Vec<Fresh> = Vec::new();
        for (run, bytes) in &batch.runs {
            for (page, at) in run.clone().zip((bytes.start..).step_by(PAGE_SIZE as usize)) {
                if !self.missing.arrived(page) {
                    continue;
                }
                let wanted = batch.lane == Lane::Hot && self.since.contains_key(&page);
                match all.last_mut() {
                    Some(last)
                        if last.run.end == page && at == last.at + bytes_of(&last.run) && !(wanted || last.wanted) =>
                    {
                        last.run.end += 1;
                    }
                    _ => all.push(Fresh { run: page..page + 1, at, wanted }),
                }
            }
        }
        all
    }

    /// Tells the source what has landed.
    fn confirm(&mut self) -> Result<(), WireError> {
        let Some(writer) = &mut self.confirms else { return Ok(()) };
        let landed = self.missing.take_unconfirmed();
        if landed.is_empty() { Ok(()) } else { send_ranges(&landed, writer, |ranges, _| Message::Landed(ranges)) }
    }

    fn figures(&self) -> FaultFigures {
        FaultFigures {
            count: self.waits_us.len(),
            p50_us: self.waits_us.value_at_quantile(0.5),
            p99_us: self.waits_us.value_at_quantile(0.99),
            max_us: self.waits_us.max(),
            holes: self.holes,
        }
    }
}

fn bytes_of(run: &Range<u64>) -> usize {
    ((run.end - run.start) * PAGE_SIZE) as usize
}
