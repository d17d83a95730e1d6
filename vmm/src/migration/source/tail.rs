//! The tail: what follows the guest once it runs at the destination.
//!
//! A page is read once, when the guest waits for it, as a neighbour of such a page, or in the background at a bounded rate;
//! it is kept until the destination has confirmed it, and given back to the host then. Without a connection everything that
//! has not been confirmed stays, and what had been read for nothing goes back to sleep.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use memory_agent::{ByteSize, Counts, PAGE_SIZE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::SourceError;
use crate::migration::link::{Address, Link};
use crate::migration::plan::{BLOCK, Tail};
use crate::migration::progress::{FaultFigures, Phase, TailReport};
use crate::migration::rendezvous::{Channel, Rendezvous};
use crate::migration::stoppable::Stoppable;
use crate::migration::wire::frame::Kind;
use crate::migration::wire::message::{check_ranges, receive_message};
use crate::migration::wire::{FrameReader, FrameWriter, Lane, Message, WireError, pages};
use crate::ram::{GuestRam, PageSet};

/// Pages sent unasked at a time: what a page that is wanted may have to wait for.
const BATCH: u64 = 16;
/// Pages that may be on their way unconfirmed before no more are sent unasked: they are read, and in memory here.
const MOST_ON_WAY: u64 = 256;
/// A guest that has wanted nothing for so long is sent the neighbours of what it wanted last.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
/// How much of a delay is made up for: a rate is kept on a busy machine too, and nothing comes in a burst.
const CATCH_UP: Duration = Duration::from_millis(50);
/// How often a connection that broke is tried anew, and progress is shown.
const TRY_EVERY: Duration = Duration::from_secs(1);
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// How the other side is reached again, and what people are told meanwhile; shared with whoever controls this monitor.
#[derive(Debug)]
pub struct Following {
    /// Where the channels come together.
    pub rendezvous: Rendezvous,
    address: Mutex<Option<Address>>,
    left: AtomicU64,
    connected: AtomicBool,
    /// The destination has said, or shown by coming back, that the guest is its own.
    confirmed: AtomicBool,
}

impl Following {
    /// For a migration to `address`, if it has one.
    pub fn new(rendezvous: Rendezvous, address: Option<Address>) -> Self {
        Self {
            rendezvous,
            address: Mutex::new(address),
            left: AtomicU64::new(0),
            connected: AtomicBool::new(true),
            confirmed: AtomicBool::new(false),
        }
    }

    /// Pages of a guest that runs elsewhere which are only here.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// Whether they are on their way.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::SeqCst)
    }

    /// Whether the guest is known to be the destination's. Until then all of it is here as well.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::SeqCst)
    }

    /// The destination has said that the guest runs there.
    pub(super) fn confirm(&self) {
        self.confirmed.store(true, Ordering::SeqCst);
    }

    /// From now on the other side is tried here.
    pub fn set_address(&self, address: Address) {
        *locked(&self.address) = Some(address);
    }

    /// Where the other side is tried.
    pub fn address(&self) -> Option<Address> {
        locked(&self.address).clone()
    }
}

#[derive(Default)]
struct Totals {
    wanted: u64,
    neighbours: u64,
    background: u64,
    given_back: u64,
    faults: Option<FaultFigures>,
    settled: Option<Counts>,
    /// Why this connection serves no more.
    end: Option<End>,
}

enum End {
    /// The destination has everything and has said how it stands.
    Settled,
    /// The guest has ended there.
    Ended,
    Broken(WireError),
}

struct State {
    tail: Tail,
    totals: Totals,
}

/// What the threads of a tail share.
struct Shared {
    ram: Arc<GuestRam>,
    following: Arc<Following>,
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes sent, over both channels.
    bytes: AtomicU64,
    /// Requests of the guest's that are being served: nothing is sent unasked meanwhile.
    busy: AtomicUsize,
}

/// What has followed the guest.
pub(super) struct Followed {
    pub(super) tail: TailReport,
    /// What guest RAM is at the destination, if it has said so.
    pub(super) destination: Option<Counts>,
    pub(super) bytes: u64,
    /// Whether the guest is known to be the destination's. It is not when somebody has given up waiting for that.
    pub(super) is_confirmed: bool,
}

/// The source's side of a tail, from the moment the guest stands.
pub(super) struct Follower {
    shared: Arc<Shared>,
    /// Serves what the guest waits for, over one connection.
    channel: Option<Stoppable>,
    pages: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    fn end(&self, end: End) {
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
    fn give_back_sent(&self) {
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
    fn hear(&self, mut reader: FrameReader<Link>) -> End {
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
    fn give_back(&self, ranges: &[Range<u64>]) {
        self.punch(ranges);
        let mut state = self.lock();
        state.totals.given_back += page_count(ranges) * PAGE_SIZE;
        self.following.left.store(state.tail.left(), Ordering::SeqCst);
        drop(state);
        self.changed.notify_all();
    }

    /// Sends what is left, at `rate` bytes a second, until this connection serves no more.
    fn send_unasked(&self, writer: &mut FrameWriter<Link>, rate: Rate, show: &mut dyn FnMut(&State)) {
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

    fn spawn_faults(self: &Arc<Self>, link: Link) -> Result<Stoppable, WireError> {
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
struct Rate(ByteSize);

impl Rate {
    fn time_of(self, pages: u64) -> Duration {
        match self.0.bytes() {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64((pages * PAGE_SIZE) as f64 / rate as f64),
        }
    }
}

impl Follower {
    /// The destination has said that the guest runs there.
    pub(super) fn confirm(&self) {
        self.shared.following.confirm();
    }

    /// The guest stands, and `tail` is to follow it; whoever faults at the destination is served from now on.
    pub(super) fn start(
        ram: &Arc<GuestRam>,
        following: &Arc<Following>,
        tail: Tail,
        faults: Link,
    ) -> Result<Self, WireError> {
        let pages = tail.left();
        let shared = Arc::new(Shared {
            ram: Arc::clone(ram),
            following: Arc::clone(following),
            state: Mutex::new(State { tail, totals: Totals::default() }),
            changed: Condvar::new(),
            bytes: AtomicU64::new(0),
            busy: AtomicUsize::new(0),
        });
        let channel = Some(shared.spawn_faults(faults)?);
        Ok(Self { shared, channel, pages })
    }

    /// The guest runs at the destination: sends what it needs until it needs nothing any more, over as many connections as that
    /// takes. `show` is told the phase, what has followed, and how many bytes that was.
    pub(super) fn follow(
        mut self,
        bulk: (FrameReader<Link>, FrameWriter<Link>),
        rate: ByteSize,
        show: &mut dyn FnMut(Phase, TailReport, u64),
    ) -> Followed {
        let started = Instant::now();
        let (mut reader, mut writer) = bulk;
        let mut cuts = 0;
        let shared = Arc::clone(&self.shared);
        shared.following.left.store(self.pages, Ordering::SeqCst);
        if shared.following.is_confirmed() {
            shared.give_back_sent();
        }
        let pages = self.pages;
        let report = |state: &State, cuts| TailReport {
            pages,
            wanted: state.totals.wanted,
            neighbours: state.totals.neighbours,
            background: state.totals.background,
            given_back: state.totals.given_back,
            needless: 0,
            cuts,
            ms: started.elapsed().as_millis() as u64,
            faults: state.totals.faults,
        };
        loop {
            shared.following.connected.store(true, Ordering::SeqCst);
            let link = reader.link().try_clone();
            let hearer = Arc::clone(&shared);
            // A connection that cannot be read in a thread of its own is one that has broken.
            let spawned = reader.link().wait_for_ever().and_then(|()| {
                Builder::new().name("hear-landed".into()).spawn(move || hearer.end(hearer.hear(reader)))
            });
            match (&spawned, &link) {
                (Ok(_), Ok(_)) => shared.send_unasked(&mut writer, Rate(rate), &mut |state| {
                    show(Phase::Tail, report(state, cuts), shared.bytes.load(Ordering::Relaxed));
                }),
                _ => shared.end(End::Broken(WireError::Closed)),
            }
            writer.link().shutdown(std::net::Shutdown::Both);
            self.channel = None;
            if let Ok(thread) = spawned {
                // It has said why it ended, if this end did not.
                let _ = thread.join();
            }
            let (end, lost, left) = {
                let mut state = shared.lock();
                let lost = state.tail.cut();
                (state.totals.end.take(), lost, state.tail.left())
            };
            let broken = match end {
                Some(End::Broken(e)) if left > 0 => e,
                _ => break,
            };
            cuts += 1;
            shared.following.connected.store(false, Ordering::SeqCst);
            tracing::warn!("{left} pages of the guest are still here, and the connection to it is gone: {broken}");
            // They were read for nothing, and sleep again until they are needed.
            if let Err(e) = shared.ram.page_out(&lost) {
                tracing::warn!("pages that were on their way stay in memory: {e}");
            }
            match self
                .reconnect(&mut |state| show(Phase::Cut, report(state, cuts), shared.bytes.load(Ordering::Relaxed)))
            {
                Some(again) => (reader, writer) = again,
                None => break,
            }
        }
        shared.following.rendezvous.close();
        let state = shared.lock();
        let left = state.tail.left();
        let is_confirmed = shared.following.is_confirmed();
        if left > 0 && is_confirmed {
            tracing::info!("the guest has ended at the destination, which needs {left} pages no more");
        }
        shared.following.left.store(0, Ordering::SeqCst);
        let (tail, destination) = (TailReport { needless: left, ..report(&state, cuts) }, state.totals.settled);
        Followed { tail, destination, bytes: shared.bytes.load(Ordering::Relaxed), is_confirmed }
    }

    /// Waits until the two sides have met again; `None` when they will not.
    fn reconnect(&mut self, show: &mut dyn FnMut(&State)) -> Option<(FrameReader<Link>, FrameWriter<Link>)> {
        let following = Arc::clone(&self.shared.following);
        loop {
            show(&self.shared.lock());
            if following.rendezvous.is_closed() {
                return None;
            }
            let met = following.rendezvous.take_both(Duration::ZERO).or_else(|| {
                if let Some(address) = following.address()
                    && let Err(e) = following.rendezvous.connect(&address, &[Channel::Bulk, Channel::Faults])
                {
                    tracing::debug!("not yet: {e}");
                }
                following.rendezvous.take_both(TRY_EVERY)
            });
            let Some((bulk, faults)) = met else { continue };
            match self.resume(bulk, faults) {
                Ok(bulk) => return Some(bulk),
                Err(e) => tracing::warn!("the new connection is of no use: {e}"),
            }
        }
    }

    /// Hears what is missing, and serves the guest over the new connection.
    fn resume(&mut self, bulk: Link, faults: Link) -> Result<(FrameReader<Link>, FrameWriter<Link>), SourceError> {
        let writer = FrameWriter::new(bulk.try_clone().map_err(WireError::from)?);
        let mut reader = FrameReader::new(bulk);
        let mut missing = PageSet::new(self.shared.ram.pages());
        loop {
            match receive_message(&mut reader, "missing")? {
                Message::Missing(ranges, is_all) => {
                    check_ranges(&ranges, missing.universe(), reader.last_sequence())?;
                    ranges.into_iter().for_each(|range| missing.insert_range(range));
                    if is_all {
                        break;
                    }
                }
                other => return Err(WireError::Unexpected { found: other.name(), expected: "missing" }.into()),
            }
        }
        self.shared.following.confirm();
        let kept = self.shared.lock().tail.resumed(&missing).map_err(|page| WireError::Payload {
            sequence: reader.last_sequence(),
            why: format!("page {page} is said to be missing, and was confirmed before"),
        })?;
        self.shared.give_back(&kept);
        self.shared.give_back_sent();
        self.channel = Some(self.shared.spawn_faults(faults)?);
        Ok((reader, writer))
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

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
