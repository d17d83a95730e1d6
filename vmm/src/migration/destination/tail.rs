//! The tail: what comes after the guest, which runs here already.
//!
//! Whoever touches a page that has not landed waits, and the source is asked for it over a channel of its own; all other
//! pages come as the source sends them. A page lands once: what the guest has written since is never overwritten. Without a
//! connection those vCPUs wait that need a page, and the others run; when the source does not come back, the guest stands.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use memory_agent::PAGE_SIZE;
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use super::landing::Landed;
use super::{DestinationError, DestinationMachine};
use crate::migration::link::{Link, Listener};
use crate::migration::plan::{Fault, Missing};
use crate::migration::progress::FaultFigures;
use crate::migration::rendezvous::Rendezvous;
use crate::migration::stoppable::Stoppable;
use crate::migration::wire::message::{Incoming, receive as receive_frame, send_ranges};
use crate::migration::wire::{FrameReader, FrameWriter, Lane, Message, PageBatch, WireError};
use crate::ram::{GuestRam, MissingRam, RamError};

/// The longest wait that is told apart, microseconds.
const LONGEST_US: u64 = 3_600_000_000;
/// So many landed pages are confirmed together, and fewer after a while: each confirmation takes both sides' CPUs, and the
/// guest waits for none.
const CONFIRMED_AT_ONCE: u64 = 64;
const CONFIRMED_AFTER: Duration = Duration::from_millis(20);
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
    /// The guest has ended or is to: nothing is needed any more.
    ended: AtomicBool,
}

impl std::fmt::Debug for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tail").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// A tail whose faults are handled.
pub(super) struct Receiver {
    pub(super) tail: Arc<Tail>,
    missing: Arc<MissingRam>,
    /// How long the source may stay away before it is taken for lost.
    patience: Duration,
    /// These serve the fault channel, answer who connects, handle faults and page out; they end in this order.
    channel: Option<Stoppable>,
    door: Option<Stoppable>,
    faults: Option<Stoppable>,
    keeper: Option<Stoppable>,
}

impl Tail {
    /// What is still to come.
    pub fn status(&self) -> TailStatus {
        let state = self.lock();
        let missing = &state.missing;
        TailStatus {
            missing: missing.left(),
            first_missing: missing.ranges().iter().take(SHOWN_RANGES).map(|r| (r.start, r.end - r.start)).collect(),
            waited_for: missing.wanted(),
            connected: state.asks.is_some(),
            source_lost: state.source_lost,
            faults: state.figures(),
        }
    }

    /// All pages that have not come.
    pub fn missing(&self) -> Vec<Range<u64>> {
        self.lock().missing.ranges()
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
        let mut fresh: Vec<(Range<u64>, usize)> = Vec::new();
        {
            let mut state = self.lock();
            for (run, bytes) in batch.runs {
                for (page, at) in run.zip((bytes.start..).step_by(PAGE_SIZE as usize)) {
                    if !state.missing.arrived(page) {
                        continue;
                    }
                    let next = at + PAGE_SIZE as usize;
                    match fresh.last_mut() {
                        Some((last, start)) if last.end == page && at == *start + bytes_of(last) => last.end += 1,
                        _ => fresh.push((page..page + 1, next - PAGE_SIZE as usize)),
                    }
                }
            }
        }
        let written = fresh
            .iter()
            .try_for_each(|(run, start)| self.ram.land_pages(run.start, &payload[*start..*start + bytes_of(run)]));
        if let Err(e) = written {
            let mut state = self.lock();
            fresh.into_iter().flat_map(|(run, _)| run).for_each(|page| state.missing.failed(page));
            return Err(e.into());
        }
        let mut state = self.lock();
        for (run, _) in &fresh {
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
            let runs = fresh.into_iter().map(|(run, _)| run).collect();
            if let Some(cold) = &state.cold {
                // Should that thread have ended, they stay in memory, whole.
                let _ = cold.send(runs);
            }
        }
        if state.missing.unconfirmed() >= CONFIRMED_AT_ONCE || state.missing.left() == 0 {
            state.confirm()?;
        }
        Ok(())
    }

    /// Lands what comes over one channel until it ends; whether the source has said that this was all.
    fn receive(&self, ram: &MissingRam, reader: &mut FrameReader<Link>) -> Result<(), DestinationError> {
        let mut payload = Vec::new();
        loop {
            match receive_frame(reader, &mut payload, self.ram.pages())? {
                Incoming::Pages(batch) => self.land(ram, batch, &payload)?,
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

impl State {
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

impl Receiver {
    /// From now on, whoever touches what has not landed waits, and is served over `faults`.
    pub(super) fn start(
        ram: &Arc<GuestRam>,
        rendezvous: &Arc<Rendezvous>,
        (door, patience): (Option<Stoppable>, Duration),
        (landed, later): (&Landed, Missing),
        faults: Link,
    ) -> Result<Self, DestinationError> {
        let missing = Arc::new(MissingRam::new(Arc::clone(ram))?);
        let waits_us = Histogram::new_with_bounds(1, LONGEST_US, 3);
        let waits_us = waits_us.map_err(|e| DestinationError::Thread(e.to_string()))?;
        let tail = Arc::new(Tail {
            ram: Arc::clone(ram),
            rendezvous: Arc::clone(rendezvous),
            state: Mutex::new(State {
                missing: later,
                since: HashMap::new(),
                waits_us,
                holes: 0,
                asks: None,
                confirms: None,
                cold: None,
                source_lost: false,
            }),
            ended: AtomicBool::new(false),
        });
        let keeper = Some(keep_cold(&tail, landed)?);
        let handler = Some(handle_faults(&tail, &missing)?);
        let channel = Some(serve_channel(&tail, &missing, faults)?);
        Ok(Self { tail, missing, patience, channel, door, faults: handler, keeper })
    }

    /// The guest is ours: what has landed is confirmed over `bulk`, and the rest received, over as many connections as that
    /// takes.
    pub(super) fn run(
        mut self,
        machine: &impl DestinationMachine,
        (mut reader, writer): (FrameReader<Link>, FrameWriter<Link>),
    ) -> (FaultFigures, Option<FrameWriter<Link>>) {
        let tail = Arc::clone(&self.tail);
        tail.lock().confirms = Some(writer);
        loop {
            let received = reader
                .link()
                .wait_for_ever()
                .map_err(|e| DestinationError::from(WireError::from(e)))
                .and_then(|()| tail.receive(&self.missing, &mut reader));
            if let Err(e) = received {
                reader.link().shutdown(std::net::Shutdown::Both);
                self.channel = None;
                let left = {
                    let mut state = tail.lock();
                    (state.asks, state.confirms) = (None, None);
                    state.missing.left()
                };
                if tail.ended.load(Ordering::SeqCst) {
                    break;
                }
                tracing::warn!(
                    "the connection to the source is gone ({e}); {left} pages of the guest are only there: waiting for it to come back"
                );
                match self.reconnect(machine) {
                    Some(again) => reader = again,
                    None => break,
                }
                continue;
            }
            break;
        }
        // Before the channels end: the last words go over it.
        let writer = tail.lock().confirms.take();
        self.channel = None;
        tail.rendezvous.close();
        self.door = None;
        self.faults = None;
        self.keeper = None;
        (tail.lock().figures(), writer)
    }

    /// Waits until the two sides have met again; `None` when nothing is needed any more. A guest whose source stays away
    /// stands meanwhile.
    fn reconnect(&mut self, machine: &impl DestinationMachine) -> Option<FrameReader<Link>> {
        let tail = Arc::clone(&self.tail);
        let mut paused = false;
        let bulk = loop {
            let met = tail.rendezvous.take_both(self.patience);
            if let Some((bulk, faults)) = met {
                match self.resume(bulk, faults) {
                    Ok(reader) => break reader,
                    Err(e) => tracing::warn!("the new connection is of no use: {e}"),
                }
                continue;
            }
            if tail.rendezvous.is_closed() || tail.lock().missing.left() == 0 {
                return None;
            }
            if !paused {
                paused = machine.is_running();
                tail.lock().source_lost = true;
                let status = tail.status();
                tracing::error!(
                    "the source has not come back within {:?}: the guest stands; {} pages are missing, first {:?} (first page, number of pages)",
                    self.patience,
                    status.missing,
                    status.first_missing,
                );
                machine.pause();
            }
        };
        tail.lock().source_lost = false;
        if paused {
            machine.resume();
        }
        Some(bulk)
    }

    /// Says what is missing, asks again for what the guest waits for, and goes on over the new connection.
    fn resume(&mut self, bulk: Link, faults: Link) -> Result<FrameReader<Link>, DestinationError> {
        let mut writer = FrameWriter::new(bulk.try_clone().map_err(WireError::from)?);
        let ranges = {
            let mut state = self.tail.lock();
            // Those that have landed are said by not being named.
            state.missing.take_unconfirmed();
            state.missing.ranges()
        };
        send_ranges(&ranges, &mut writer, Message::Missing)?;
        self.channel = Some(serve_channel(&self.tail, &self.missing, faults)?);
        self.tail.lock().confirms = Some(writer);
        Ok(FrameReader::new(bulk))
    }
}

fn bytes_of(run: &Range<u64>) -> usize {
    ((run.end - run.start) * PAGE_SIZE) as usize
}

/// Answers whoever connects, until the rendezvous is closed.
pub(super) fn open_door(rendezvous: &Arc<Rendezvous>, listener: Listener) -> Result<Stoppable, DestinationError> {
    let (server, closer) = (Arc::clone(rendezvous), Arc::clone(rendezvous));
    thread(Stoppable::spawn("tail-door", move || closer.close(), move || server.serve(&listener)))
}

/// Starts the thread that pages out cold pages as they land, and confirms what nobody else has.
fn keep_cold(tail: &Arc<Tail>, landed: &Landed) -> Result<Stoppable, DestinationError> {
    let (sender, runs) = channel::<Vec<Range<u64>>>();
    let (ram, landed) = (Arc::clone(&tail.ram), landed.clone());
    tail.lock().cold = Some(sender);
    let (tail, confirming) = (Arc::clone(tail), Arc::clone(tail));
    let stop = move || tail.lock().cold = None;
    thread(Stoppable::spawn("keep-cold", stop, move || {
        loop {
            match runs.recv_timeout(CONFIRMED_AFTER) {
                Ok(runs) => {
                    if let Err(e) = landed.landed(&ram, runs.into_iter()) {
                        tracing::warn!("cold pages stay in memory here: {e}");
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    // When the connection has broken, whoever reads from it sees that.
                    let _ = confirming.lock().confirm();
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    }))
}

fn handle_faults(tail: &Arc<Tail>, missing: &Arc<MissingRam>) -> Result<Stoppable, DestinationError> {
    let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| DestinationError::Thread(e.to_string()))?;
    let event = Arc::new(event);
    let ender = Arc::clone(&event);
    let stop = move || {
        // The counter would have to be at its limit for this to fail, and then the event is set.
        let _ = rustix::io::write(&*ender, &1_u64.to_ne_bytes());
    };
    let (tail, missing) = (Arc::clone(tail), Arc::clone(missing));
    thread(Stoppable::spawn("faults", stop, move || {
        let mut pages = Vec::new();
        loop {
            let go_on = missing.wait(event.as_fd(), |page| pages.push(page));
            let handled = go_on.and_then(|go_on| {
                pages.drain(..).try_for_each(|page| tail.fault(&missing, page))?;
                Ok(go_on)
            });
            match handled {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    // The guest waits; nothing wrong is ever shown to it.
                    tracing::error!("a page fault of the guest could not be handled: {e}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }))
}

/// Asks for what the guest waits for over `link`, and lands it.
fn serve_channel(tail: &Arc<Tail>, missing: &Arc<MissingRam>, link: Link) -> Result<Stoppable, DestinationError> {
    link.wait_for_ever().map_err(WireError::from)?;
    let ender = link.try_clone().map_err(WireError::from)?;
    let mut writer = FrameWriter::new(link.try_clone().map_err(WireError::from)?);
    {
        let mut state = tail.lock();
        let wanted = state.missing.wanted_pages();
        if !wanted.is_empty() {
            send_ranges(&wanted, &mut writer, |ranges, _| Message::Want(ranges))?;
        }
        state.asks = Some(writer);
    }
    let (tail, missing) = (Arc::clone(tail), Arc::clone(missing));
    let stop = move || ender.shutdown(std::net::Shutdown::Both);
    thread(Stoppable::spawn("land-wanted", stop, move || {
        let mut reader = FrameReader::new(link);
        if let Err(e) = tail.receive(&missing, &mut reader) {
            tracing::debug!("the channel for pages that are waited for has ended: {e}");
        }
        let mut state = tail.lock();
        state.asks = None;
        // One channel alone is of no use: whoever receives the other sees that it is over.
        if let Some(writer) = &mut state.confirms {
            writer.link().shutdown(std::net::Shutdown::Both);
        }
    }))
}

fn thread(started: std::io::Result<Stoppable>) -> Result<Stoppable, DestinationError> {
    started.map_err(|e| DestinationError::Thread(e.to_string()))
}
