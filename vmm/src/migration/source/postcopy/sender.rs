//! What the threads of post-copy share, and those that the guest does not wait for: what is sent unasked, heard of and given back.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memory_agent::{ByteSize, Counts, PAGE_SIZE, PageRange};

use super::super::guest::Guest;
use super::PostCopyControl;
use crate::log_limit::LogLimit;
use crate::migration::fault_priority::FaultPriority;
use crate::migration::link::Link;
use crate::migration::plan::Outstanding;
use crate::migration::progress::FaultFigures;
use crate::migration::wire::frame::Kind;
use crate::migration::wire::message::{check_ranges, receive_message};
use crate::migration::wire::{FrameReader, FrameWriter, Lane, Message, WireError, pages};
use crate::ram::{GuestRam, RamError, RamPage, ReadPages};

/// Pages sent unasked at a time: what a page that is wanted may have to wait for.
const BATCH: u64 = 16;
/// Pages that may be on their way unconfirmed before no more are sent unasked: they are read, and in memory here.
const MOST_ON_WAY: u64 = 256;
/// How much of a delay is made up for: a rate is kept on a busy machine too, and nothing comes in a burst.
const CATCH_UP: Duration = Duration::from_millis(50);
/// How often pages that could not be read are tried again.
const TRY_UNREADABLE: Duration = Duration::from_secs(5);
/// How often progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// What has been sent and heard so far.
#[derive(Default)]
pub(super) struct Totals {
    pub(super) requested: u64,
    pub(super) neighbours: u64,
    pub(super) background: u64,
    pub(super) given_back: u64,
    pub(super) faults: Option<FaultFigures>,
    pub(super) settled: Option<Counts>,
    /// Why this connection serves no more.
    pub(super) end: Option<ConnectionEnd>,
}

/// Why a connection serves no more.
pub(super) enum ConnectionEnd {
    /// The destination has everything and has said how it stands.
    PagedOut,
    /// The guest has ended there.
    Ended,
    /// The connection has failed.
    Broken(WireError),
}

/// What is left, and what has become of the rest.
pub(super) struct State {
    pub(super) outstanding: Outstanding,
    pub(super) totals: Totals,
}

/// What the threads of post-copy share.
pub(super) struct Shared {
    pub(super) ram: Arc<GuestRam>,
    reader: Arc<dyn ReadPages>,
    complaint: Mutex<LogLimit>,
    pub(super) control: Arc<PostCopyControl>,
    state: Mutex<State>,
    pub(super) changed: Condvar,
    /// Of the guest, over whoever sends unasked and gives back.
    pub(super) fault_priority: FaultPriority,
    /// Bytes sent, over both channels.
    pub(super) bytes: AtomicU64,
}

impl Shared {
    pub(super) fn new(guest: &Guest<'_>, control: &Arc<PostCopyControl>, outstanding: Outstanding) -> Self {
        Self {
            ram: Arc::clone(guest.ram()),
            reader: guest.page_reader(),
            complaint: Mutex::default(),
            control: Arc::clone(control),
            state: Mutex::new(State { outstanding, totals: Totals::default() }),
            changed: Condvar::new(),
            fault_priority: FaultPriority::default(),
            bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn end(&self, end: ConnectionEnd) {
        self.lock().totals.end.get_or_insert(end);
        self.changed.notify_all();
    }

    /// Reads pages and sends them, all but those that cannot be read.
    pub(super) fn send(
        &self,
        writer: &mut FrameWriter<Link>,
        lane: Lane,
        runs: &[Range<RamPage>],
        payload: &mut Vec<u8>,
    ) -> Result<(), WireError> {
        let mut runs = Cow::Borrowed(runs);
        while !runs.is_empty() {
            let read = |page, bytes: &mut [u8]| self.reader.read_page(page, bytes).map_err(|e| (page, e));
            match pages::encode(lane, &runs, payload, read) {
                Ok(sum) => {
                    self.bytes.fetch_add(payload.len() as u64, Ordering::Relaxed);
                    return writer.write_summed(Kind::Pages, payload, sum);
                }
                Err((page, e)) => {
                    self.cannot_read(page, &e);
                    runs = runs
                        .iter()
                        .flat_map(|run| [run.start..run.end.min(page), run.start.max(page + 1)..run.end])
                        .filter(|run| !run.is_empty())
                        .collect();
                }
            }
        }
        Ok(())
    }

    /// Leaves a page alone for a while, and says so now and then.
    fn cannot_read(&self, page: RamPage, why: &RamError) {
        let unreadable = {
            let mut state = self.lock();
            state.outstanding.cannot_read(page);
            state.outstanding.unreadable()
        };
        if self.complaint.lock().unwrap_or_else(PoisonError::into_inner).is_due() {
            tracing::error!(
                "{why}; such pages: {unreadable}. The guest stops where it needs one. All others are sent, and these are tried again every {TRY_UNREADABLE:?}"
            );
        }
    }

    /// What was sent before switchover is nothing but memory here, too.
    pub(super) fn give_back_sent(&self) {
        let kept = self.lock().outstanding.ranges();
        self.punch(&gaps(&kept, &self.ram.all_pages()));
    }

    /// All of it is the destination's. Of huge pages, parts that were given back one by one may have stayed.
    pub(super) fn give_back_all(&self) {
        let all = self.ram.all_pages();
        self.punch(std::slice::from_ref(&all));
    }

    fn punch(&self, ranges: &[Range<RamPage>]) {
        for range in ranges {
            if let Err(e) = self.ram.punch(range.clone()) {
                tracing::warn!("pages that are not needed here any more stay in memory: {e}");
            }
        }
    }

    /// Hears what has landed, until the connection ends.
    pub(super) fn hear(&self, mut reader: FrameReader<Link>) -> ConnectionEnd {
        loop {
            let message = match receive_message(&mut reader, "landed") {
                Ok(message) => message,
                Err(e) => return ConnectionEnd::Broken(e),
            };
            match message {
                Message::Landed(ranges) => {
                    if let Err(e) = check_ranges(&ranges, self.ram.pages(), reader.last_sequence()) {
                        return ConnectionEnd::Broken(e);
                    }
                    self.control.confirm();
                    let kept: Vec<_> = {
                        let mut state = self.lock();
                        ranges.into_iter().flat_map(|range| state.outstanding.confirmed(range)).collect()
                    };
                    self.fault_priority.give_way();
                    self.give_back(&kept);
                }
                Message::Served(figures) => self.lock().totals.faults = Some(figures),
                Message::PagedOut(counts) => {
                    self.lock().totals.settled = Some(counts);
                    return ConnectionEnd::PagedOut;
                }
                Message::Ended => return ConnectionEnd::Ended,
                other => {
                    return ConnectionEnd::Broken(WireError::Unexpected { found: other.name(), expected: "landed" });
                }
            }
        }
    }

    /// The destination has these: they are nothing but memory here.
    pub(super) fn give_back(&self, ranges: &[Range<RamPage>]) {
        self.punch(ranges);
        let mut state = self.lock();
        state.totals.given_back += page_count(ranges) * PAGE_SIZE;
        self.control.keeps(state.outstanding.left());
        drop(state);
        self.changed.notify_all();
    }

    /// Sends what is left, at `rate` bytes a second, until this connection serves no more.
    pub(super) fn send_unasked(&self, writer: &mut FrameWriter<Link>, rate: Rate, show: &mut dyn FnMut(&State)) {
        let mut payload = Vec::new();
        let mut due = Instant::now();
        let mut shown = Instant::now();
        let mut tried = Instant::now();
        let mut told = false;
        loop {
            // Before anything is looked at: between that and waiting for it to change, nothing may be missed.
            self.fault_priority.give_way();
            let mut state = self.lock();
            if state.totals.end.is_some() {
                return;
            }
            if shown.elapsed() >= SHOW_EVERY {
                shown = Instant::now();
                show(&state);
            }
            if tried.elapsed() >= TRY_UNREADABLE {
                tried = Instant::now();
                state.outstanding.try_unreadable();
            }
            let is_done = state.outstanding.left() == 0;
            if is_done && !told {
                told = true;
                drop(state);
                if let Err(e) = Message::PostCopyEnd.send(writer) {
                    self.end(ConnectionEnd::Broken(e));
                }
                continue;
            }
            let now = Instant::now();
            let waits = is_done || state.outstanding.on_way() >= MOST_ON_WAY || now < due;
            let runs = if waits { Vec::new() } else { state.outstanding.next(BATCH) };
            if runs.is_empty() {
                let limit = if now < due { (due - now).min(SHOW_EVERY) } else { SHOW_EVERY };
                drop(self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            state.totals.background += page_count(&runs);
            let (hot, cold): (Vec<_>, Vec<_>) = runs.into_iter().partition(|run| state.outstanding.is_hot(run.start));
            drop(state);
            for (lane, runs) in [(Lane::Hot, hot), (Lane::Cold, cold)] {
                if runs.is_empty() {
                    continue;
                }
                due = due.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + rate.time_of(page_count(&runs));
                if let Err(e) = self.send(writer, lane, &runs, &mut payload) {
                    return self.end(ConnectionEnd::Broken(e));
                }
            }
        }
    }
}

/// How quickly pages are sent that nobody waits for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate(pub(super) ByteSize);

impl Rate {
    fn time_of(self, pages: u64) -> Duration {
        match self.0.bytes() {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64((pages * PAGE_SIZE) as f64 / rate as f64),
        }
    }
}

/// What of `all` lies between ranges in order.
fn gaps(ranges: &[Range<RamPage>], all: &Range<RamPage>) -> Vec<Range<RamPage>> {
    let starts = std::iter::once(all.start).chain(ranges.iter().map(|range| range.end));
    let ends = ranges.iter().map(|range| range.start).chain(std::iter::once(all.end));
    starts.zip(ends).map(|(start, end)| start..end).filter(|gap| !gap.is_empty()).collect()
}

pub(super) fn page_count(runs: &[Range<RamPage>]) -> u64 {
    runs.iter().map(PageRange::page_count).sum()
}
