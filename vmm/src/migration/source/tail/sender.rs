//! What is read, sent, heard of and given back: what the threads of a tail share.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memory_agent::{ByteSize, Counts, PAGE_SIZE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::Following;
use crate::migration::link::Link;
use crate::migration::plan::{BLOCK, Tail};
use crate::migration::progress::FaultFigures;
use crate::migration::stoppable::Stoppable;
use crate::migration::wire::frame::Kind;
use crate::migration::wire::message::{check_ranges, receive_message};
use crate::migration::wire::{FrameReader, FrameWriter, Lane, Message, WireError, pages};
use crate::ram::GuestRam;

/// Pages sent unasked at a time: what a page that is wanted may have to wait for.
const BATCH: u64 = 16;
/// Pages that may be on their way unconfirmed before no more are sent unasked: they are read, and in memory here.
const MOST_ON_WAY: u64 = 256;
/// A guest that has wanted nothing for so long is sent the neighbours of what it wanted last.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
/// How much of a delay is made up for: a rate is kept on a busy machine too, and nothing comes in a burst.
const CATCH_UP: Duration = Duration::from_millis(50);
/// How often progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// What has been sent and heard so far.
#[derive(Default)]
pub(super) struct Totals {
    pub(super) wanted: u64,
    pub(super) neighbours: u64,
    pub(super) background: u64,
    pub(super) given_back: u64,
    pub(super) faults: Option<FaultFigures>,
    pub(super) settled: Option<Counts>,
    /// Why this connection serves no more.
    pub(super) end: Option<End>,
}

/// Why a connection serves no more.
pub(super) enum End {
    /// The destination has everything and has said how it stands.
    Settled,
    /// The guest has ended there.
    Ended,
    /// The connection has failed.
    Broken(WireError),
}

/// What is left, and what has become of the rest.
pub(super) struct State {
    pub(super) tail: Tail,
    pub(super) totals: Totals,
}

/// What the threads of a tail share.
pub(super) struct Shared {
    pub(super) ram: Arc<GuestRam>,
    pub(super) following: Arc<Following>,
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes sent, over both channels.
    pub(super) bytes: AtomicU64,
    /// Requests of the guest's that are being served: nothing is sent unasked meanwhile.
    busy: AtomicUsize,
}

impl Shared {
    pub(super) fn new(ram: &Arc<GuestRam>, following: &Arc<Following>, tail: Tail) -> Self {
        Self {
            ram: Arc::clone(ram),
            following: Arc::clone(following),
            state: Mutex::new(State { tail, totals: Totals::default() }),
            changed: Condvar::new(),
            bytes: AtomicU64::new(0),
            busy: AtomicUsize::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn end(&self, end: End) {
        self.lock().totals.end.get_or_insert(end);
        self.changed.notify_all();
    }

    /// Serves one connection until it ends.
    fn serve_faults(&self, link: Link) -> Result<(), WireError> {
        link.wait_for_ever()?;
        let mut writer = FrameWriter::new(link.try_clone()?);
        let mut reader = FrameReader::new(link);
        let mut payload = Vec::new();
        let mut last = None;
        loop {
            let wanted = match receive_message(&mut reader, "want")? {
                Message::Want(ranges) => ranges,
                other => return Err(WireError::Unexpected { found: other.name(), expected: "want" }),
            };
            check_ranges(&wanted, self.ram.pages(), reader.last_sequence())?;
            for page in wanted.into_iter().flatten() {
                self.busy.fetch_add(1, Ordering::SeqCst);
                let served = self.serve(page, &mut writer, &mut payload);
                self.busy.fetch_sub(1, Ordering::SeqCst);
                self.changed.notify_all();
                let neighbours = served?;
                // A guest that goes through its memory in order wants the neighbours next; one that does not gets them
                // once it wants nothing else, so that it need not wait for them.
                let is_in_order = last.is_some_and(|last| (last..=last + BLOCK).contains(&page));
                last = Some(page);
                if is_in_order || !is_readable(reader.link(), QUIET)? {
                    self.lock().totals.neighbours += page_count(&neighbours);
                    if !neighbours.is_empty() {
                        self.send(&mut writer, Lane::Cold, &neighbours, &mut payload)?;
                    }
                } else {
                    let mut state = self.lock();
                    neighbours.into_iter().for_each(|run| state.tail.not_sent(run));
                }
            }
        }
    }

    /// Sends a page that the guest waits for, by itself and first, and returns its neighbours.
    fn serve(
        &self,
        page: u64,
        writer: &mut FrameWriter<Link>,
        payload: &mut Vec<u8>,
    ) -> Result<Vec<Range<u64>>, WireError> {
        let neighbours = {
            let mut state = self.lock();
            let neighbours = state.tail.wanted(page);
            state.totals.wanted += u64::from(neighbours.is_some());
            neighbours
        };
        // None: it was confirmed meanwhile.
        let Some(neighbours) = neighbours else { return Ok(Vec::new()) };
        self.send(writer, Lane::Hot, &[page..page + 1], payload)?;
        Ok(neighbours)
    }

    /// Reads pages and sends them.
    fn send(
        &self,
        writer: &mut FrameWriter<Link>,
        lane: Lane,
        runs: &[Range<u64>],
        payload: &mut Vec<u8>,
    ) -> Result<(), WireError> {
        let read = |page, bytes: &mut [u8]| self.ram.read_asleep(page..page + 1, bytes);
        let sum = pages::encode(lane, runs, payload, read).map_err(|e| WireError::Io(std::io::Error::other(e)))?;
        self.punch_again(runs);
        self.bytes.fetch_add(payload.len() as u64, Ordering::Relaxed);
        writer.write_summed(Kind::Pages, payload, sum)
    }

    /// Pages that were confirmed, by another copy of them, while they were read: reading a hole has allocated it.
    fn punch_again(&self, runs: &[Range<u64>]) {
        let gone: Vec<_> = {
            let state = self.lock();
            runs.iter().cloned().flatten().filter(|page| !state.tail.keeps(*page)).collect()
        };
        gone.into_iter().for_each(|page| self.punch(&[page..page + 1]));
    }

    /// What went before the guest did is nothing but memory here, too.
    pub(super) fn give_back_sent(&self) {
        let kept = self.lock().tail.ranges();
        self.punch(&gaps(&kept, self.ram.pages()));
    }

    fn punch(&self, ranges: &[Range<u64>]) {
        for range in ranges {
            if let Err(e) = self.ram.punch(range.clone()) {
                tracing::warn!("pages that are not needed here any more stay in memory: {e}");
            }
        }
    }

    /// Hears what has landed, until the connection ends.
    pub(super) fn hear(&self, mut reader: FrameReader<Link>) -> End {
        loop {
            let message = match receive_message(&mut reader, "landed") {
                Ok(message) => message,
                Err(e) => return End::Broken(e),
            };
            match message {
                Message::Landed(ranges) => {
                    if let Err(e) = check_ranges(&ranges, self.ram.pages(), reader.last_sequence()) {
                        return End::Broken(e);
                    }
                    self.following.confirm();
                    let kept: Vec<_> = {
                        let mut state = self.lock();
                        ranges.into_iter().flat_map(|range| state.tail.confirmed(range)).collect()
                    };
                    self.give_back(&kept);
                }
                Message::Served(figures) => self.lock().totals.faults = Some(figures),
                Message::Settled(counts) => {
                    self.lock().totals.settled = Some(counts);
                    return End::Settled;
                }
                Message::Ended => return End::Ended,
                other => {
                    return End::Broken(WireError::Unexpected { found: other.name(), expected: "landed" });
                }
            }
        }
    }

    /// The destination has these: they are nothing but memory here.
    pub(super) fn give_back(&self, ranges: &[Range<u64>]) {
        self.punch(ranges);
        let mut state = self.lock();
        state.totals.given_back += page_count(ranges) * PAGE_SIZE;
        self.following.keeps(state.tail.left());
        drop(state);
        self.changed.notify_all();
    }

    /// Sends what is left, at `rate` bytes a second, until this connection serves no more.
    pub(super) fn send_unasked(&self, writer: &mut FrameWriter<Link>, rate: Rate, show: &mut dyn FnMut(&State)) {
        let mut payload = Vec::new();
        let mut due = Instant::now();
        let mut shown = Instant::now();
        let mut told = false;
        loop {
            let mut state = self.lock();
            if state.totals.end.is_some() {
                return;
            }
            if shown.elapsed() >= SHOW_EVERY {
                shown = Instant::now();
                show(&state);
            }
            let is_done = state.tail.left() == 0;
            if is_done && !told {
                told = true;
                drop(state);
                if let Err(e) = Message::TailEnd.send(writer) {
                    self.end(End::Broken(e));
                }
                continue;
            }
            let now = Instant::now();
            let waits = is_done || self.busy.load(Ordering::SeqCst) > 0 || state.tail.on_way() >= MOST_ON_WAY;
            let runs = if waits || now < due { Vec::new() } else { state.tail.next(BATCH) };
            if runs.is_empty() {
                let limit = if now < due { (due - now).min(SHOW_EVERY) } else { SHOW_EVERY };
                drop(self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            state.totals.background += page_count(&runs);
            let (hot, cold): (Vec<_>, Vec<_>) = runs.into_iter().partition(|run| state.tail.is_hot(run.start));
            drop(state);
            for (lane, runs) in [(Lane::Hot, hot), (Lane::Cold, cold)] {
                if runs.is_empty() {
                    continue;
                }
                due = due.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + rate.time_of(page_count(&runs));
                if let Err(e) = self.send(writer, lane, &runs, &mut payload) {
                    return self.end(End::Broken(e));
                }
            }
        }
    }

    pub(super) fn spawn_faults(self: &Arc<Self>, link: Link) -> Result<Stoppable, WireError> {
        let ender = link.try_clone()?;
        let shared = Arc::clone(self);
        let stop = move || ender.shutdown(std::net::Shutdown::Both);
        Ok(Stoppable::spawn("serve-faults", stop, move || {
            // Once everything has been confirmed the destination closes this channel, and has its last words on the other.
            if let Err(e) = shared.serve_faults(link)
                && shared.lock().tail.left() > 0
            {
                shared.end(End::Broken(e));
            }
        })?)
    }
}

/// How quickly pages follow that nobody waits for.
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

/// What lies between ranges in order, of so many pages.
fn gaps(ranges: &[Range<u64>], pages: u64) -> Vec<Range<u64>> {
    let starts = std::iter::once(0).chain(ranges.iter().map(|range| range.end));
    let ends = ranges.iter().map(|range| range.start).chain(std::iter::once(pages));
    starts.zip(ends).map(|(start, end)| start..end).filter(|gap| !gap.is_empty()).collect()
}

/// Whether something comes soon, or the connection has ended.
fn is_readable(link: &Link, soon: Timespec) -> Result<bool, WireError> {
    match poll(&mut [PollFd::new(link, PollFlags::IN)], Some(&soon)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(true),
        Err(e) => Err(WireError::Io(e.into())),
    }
}

fn page_count(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|run| run.end - run.start).sum()
}
