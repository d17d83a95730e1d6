//! Post-copy: what is sent once the guest runs at the destination.
//!
//! A page is read once, when the guest waits for it, as a neighbour of such a page, or in the background at a bounded rate;
//! it is kept until the destination has confirmed it, and given back to the host then. Without a connection everything that
//! has not been confirmed stays, and what had been read for nothing is paged out again.

mod control;
mod faults;
mod sender;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub use control::PostCopyControl;
use memory_agent::{ByteSize, Counts};
use sender::{ConnectionEnd, Rate, Shared, State};

use super::SourceError;
use super::guest::Guest;
use crate::host::thread;
use crate::migration::link::Link;
use crate::migration::plan::Outstanding;
use crate::migration::progress::{Phase, PostCopyReport};
use crate::migration::stoppable::{Stoppable, in_this_span};
use crate::migration::wire::message::{check_ranges, receive_message};
use crate::migration::wire::{Channel, FrameReader, FrameWriter, Message, WireError};
use crate::ram::PageSet;

/// How often a connection that broke is tried anew.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// The pause behind a connection over which nothing has got, and the longest one behind many of them.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The channel for pages that nobody waits for.
type Bulk = (FrameReader<Link>, FrameWriter<Link>);
/// Whoever is told the phase, what has been sent, and how many bytes that was.
type Show<'s> = dyn FnMut(Phase, PostCopyReport, u64) + 's;

/// What post-copy has sent.
pub(super) struct PostCopyOutcome {
    pub(super) report: PostCopyReport,
    /// What guest RAM is at the destination, if it has said so.
    pub(super) destination: Option<Counts>,
    pub(super) bytes: u64,
    /// Whether the guest is known to be the destination's. It is not when somebody has given up waiting for that.
    pub(super) is_confirmed: bool,
}

/// The source's side of post-copy, from the moment the guest is paused.
pub(super) struct PostCopySource {
    shared: Arc<Shared>,
    /// Serves what the guest waits for, over one connection.
    channel: Option<Stoppable>,
    pages: u64,
    /// When switchover was.
    started: Instant,
    /// How often the connection broke.
    cuts: u32,
    /// How long to leave the other side alone before the next connection: connections over which nothing gets are made ever
    /// more seldom.
    pause: Duration,
}

impl PostCopySource {
    /// The destination has said that the guest runs there.
    pub(super) fn confirm(&self) {
        self.shared.control.confirm();
    }

    /// The guest is paused, and `outstanding` is to be sent; whoever faults at the destination is served from now on.
    pub(super) fn start(
        guest: &Guest<'_>,
        control: &Arc<PostCopyControl>,
        outstanding: Outstanding,
        faults: Link,
    ) -> Result<Self, WireError> {
        let pages = outstanding.left();
        let shared = Arc::new(Shared::new(guest, control, outstanding));
        let channel = Some(shared.spawn_faults(faults)?);
        Ok(Self { shared, channel, pages, started: Instant::now(), cuts: 0, pause: Duration::ZERO })
    }

    /// The guest runs at the destination: sends what it needs until it needs nothing any more, over as many connections as that
    /// takes, at `rate` bytes a second beside what it waits for. `show` is told the phase, what has been sent, and how many bytes
    /// that was.
    pub(super) fn follow(mut self, mut bulk: Bulk, rate: ByteSize, show: &mut Show<'_>) -> PostCopyOutcome {
        self.begin();
        let mut left = self.pages;
        while let Some(broken) = self.serve(bulk, Rate(rate), show) {
            self.restore_residency(&broken);
            let before = std::mem::replace(&mut left, self.shared.lock().outstanding.left());
            self.pause = if left < before { Duration::ZERO } else { self.longer_pause() };
            match self.reconnect(show) {
                Some(again) => bulk = again,
                None => break,
            }
        }
        self.finish()
    }

    /// What was sent before switchover is given back, if the guest is known to have gone.
    fn begin(&mut self) {
        self.started = Instant::now();
        self.shared.control.keeps(self.pages);
        if self.shared.control.is_confirmed() {
            self.shared.give_back_sent();
        }
    }

    /// Serves the guest over one connection until that ends; why it broke, if anything is outstanding.
    fn serve(&mut self, (mut reader, mut writer): Bulk, rate: Rate, show: &mut Show<'_>) -> Option<WireError> {
        let shared = Arc::clone(&self.shared);
        shared.control.has_connection(true);
        let hearer = Arc::clone(&shared);
        // A connection that cannot be read in a thread of its own is one that has broken.
        let spawned = reader
            .link()
            .wait_for_ever()
            .and_then(|()| thread("hear-landed")?.spawn(in_this_span(move || hearer.end(hearer.hear(reader)))));
        match &spawned {
            Ok(_) => shared.send_unasked(&mut writer, rate, &mut |state| self.show(Phase::PostCopy, state, show)),
            Err(_) => shared.end(ConnectionEnd::Broken(WireError::Closed)),
        }
        writer.link().shutdown(std::net::Shutdown::Both);
        self.channel = None;
        if let Ok(thread) = spawned {
            // It has said why it ended, if this end did not.
            let _ = thread.join();
        }
        let mut state = shared.lock();
        match state.totals.end.take() {
            Some(ConnectionEnd::Broken(e)) if state.outstanding.left() > 0 => Some(e),
            _ => None,
        }
    }

    /// What was on its way was read for nothing, and is paged out again until it is needed.
    fn restore_residency(&mut self, broken: &WireError) {
        self.cuts += 1;
        self.shared.control.has_connection(false);
        let (lost, left) = {
            let mut state = self.shared.lock();
            (state.outstanding.cut(), state.outstanding.left())
        };
        tracing::warn!("{left} pages of the guest are still here, and the connection to it is gone: {broken}");
        if let Err(e) = self.shared.ram.page_out(&lost) {
            tracing::warn!("pages that were on their way stay in memory: {e}");
        }
    }

    /// Nothing is outstanding any more.
    fn finish(self) -> PostCopyOutcome {
        let control = &self.shared.control;
        control.channels.close();
        let state = self.shared.lock();
        let left = state.outstanding.left();
        let is_confirmed = control.is_confirmed();
        if left > 0 && is_confirmed {
            tracing::info!("the guest has ended at the destination, which needs {left} pages no more");
        }
        if left == 0 && is_confirmed {
            self.shared.give_back_all();
        }
        control.keeps(0);
        PostCopyOutcome {
            report: PostCopyReport { needless: left, ..self.report(&state) },
            destination: state.totals.settled,
            bytes: self.shared.bytes.load(Ordering::Relaxed),
            is_confirmed,
        }
    }

    fn show(&self, phase: Phase, state: &State, show: &mut Show<'_>) {
        show(phase, self.report(state), self.shared.bytes.load(Ordering::Relaxed));
    }

    fn report(&self, state: &State) -> PostCopyReport {
        let totals = &state.totals;
        PostCopyReport {
            pages: self.pages,
            requested: totals.requested,
            neighbours: totals.neighbours,
            background: totals.background,
            given_back: totals.given_back,
            unreadable: state.outstanding.unreadable(),
            needless: 0,
            cuts: self.cuts,
            ms: self.started.elapsed().as_millis() as u64,
            faults: totals.faults,
        }
    }

    /// Waits until the two sides have met again; `None` when they will not.
    fn reconnect(&mut self, show: &mut Show<'_>) -> Option<Bulk> {
        let control = Arc::clone(&self.shared.control);
        loop {
            self.show(Phase::PostCopyPaused, &self.shared.lock(), show);
            if control.channels.is_closed() {
                return None;
            }
            let met = control.channels.take_both(self.pause).or_else(|| {
                if let Some(address) = control.address()
                    && let Err(e) = control.channels.connect(&address, &[Channel::Bulk, Channel::Faults])
                {
                    tracing::debug!("not yet: {e}");
                }
                control.channels.take_both(TRY_EVERY)
            });
            let Some((bulk, faults)) = met else { continue };
            match self.resume(bulk, faults) {
                Ok(bulk) => return Some(bulk),
                Err(e) => {
                    tracing::warn!("the new connection is of no use: {e}");
                    self.pause = self.longer_pause();
                }
            }
        }
    }

    fn longer_pause(&self) -> Duration {
        (self.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
    }

    /// Hears what is missing, and serves the guest over the new connection.
    fn resume(&mut self, bulk: Link, faults: Link) -> Result<Bulk, SourceError> {
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
        self.shared.control.confirm();
        let kept = self.shared.lock().outstanding.resumed(&missing).map_err(|page| WireError::Payload {
            sequence: reader.last_sequence(),
            why: format!("page {page} is said to be missing, and was confirmed before"),
        })?;
        self.shared.give_back(&kept);
        self.shared.give_back_sent();
        self.channel = Some(self.shared.spawn_faults(faults)?);
        Ok((reader, writer))
    }
}
