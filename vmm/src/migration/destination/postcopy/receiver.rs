//! Post-copy from its beginning to its end, over as many connections as that takes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::faults::FaultHandler;
use super::threads::keep_cold;
use super::{LONGEST_US, PostCopy, Stage, State};
use crate::migration::channels::Channels;
use crate::migration::destination::landing::Landed;
use crate::migration::destination::{DestinationError, DestinationMachine};
use crate::migration::fault_priority::FaultPriority;
use crate::migration::link::Link;
use crate::migration::plan::Missing;
use crate::migration::progress::FaultFigures;
use crate::migration::stoppable::Stoppable;
use crate::migration::wire::message::send_ranges;
use crate::migration::wire::{FrameReader, FrameWriter, Message, WireError};

/// How often a guest that has been asked to stop is asked again, until it is paused.
const ASK_AGAIN: Duration = Duration::from_millis(10);
/// How long a guest that is given up may take to stop before what its vCPUs wait for is taken not to come.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// Post-copy whose faults are handled.
pub(in super::super) struct Receiver {
    post_copy: Arc<PostCopy>,
    /// How long the source may stay away before it is taken for lost.
    source_timeout: Duration,
    /// These handle faults and page out; they end in this order.
    faults: FaultHandler,
    cold_window: Stoppable,
}

impl Receiver {
    /// What people see of it.
    pub(in super::super) fn post_copy(&self) -> &Arc<PostCopy> {
        &self.post_copy
    }

    /// From now on, whoever touches what has not landed waits, and is served over `faults`.
    pub(in super::super) fn start(
        machine: &impl DestinationMachine,
        channels: &Arc<Channels>,
        source_timeout: Duration,
        (landed, later): (&Landed, Missing),
        faults: Link,
    ) -> Result<Self, DestinationError> {
        let ram = machine.ram();
        let pages = machine.missing_pages()?;
        // Nothing can come in their place from here on but what lands there.
        ram.make_holes(later.ranges())?;
        let waits_us = Histogram::new_with_bounds(1, LONGEST_US, 3);
        let waits_us = waits_us.map_err(|e| DestinationError::Thread(e.to_string()))?;
        let post_copy = Arc::new(PostCopy {
            ram: Arc::clone(ram),
            pages,
            channels: Arc::clone(channels),
            state: Mutex::new(State {
                missing: later,
                since: HashMap::new(),
                waits_us,
                holes: 0,
                asks: None,
                confirms: None,
                cold: None,
                source_lost: false,
                stage: Stage::Restoring,
                has_lost_faults: false,
            }),
            fault_priority: FaultPriority::default(),
            ended: AtomicBool::new(false),
        });
        let cold_window = keep_cold(&post_copy, landed)?;
        let mut handler = FaultHandler::start(&post_copy)?;
        handler.serve(faults)?;
        Ok(Self { post_copy, source_timeout, faults: handler, cold_window })
    }

    /// The machine has been restored, or this has failed. From here on a connection that breaks is waited for.
    ///
    /// # Errors
    /// When what was waited for meanwhile has not come: then the guest cannot be here.
    pub(in super::super) fn restored(&self) -> Result<(), DestinationError> {
        let mut state = self.post_copy.lock();
        if state.stage == Stage::Failed {
            return Err(WireError::Closed.into());
        }
        state.stage = Stage::Restored;
        Ok(())
    }

    /// The guest is ours: what has landed is confirmed over `bulk`, and the rest received, over as many connections as that
    /// takes.
    pub(in super::super) fn run(
        mut self,
        machine: &impl DestinationMachine,
        (mut reader, writer): (FrameReader<Link>, FrameWriter<Link>),
    ) -> (FaultFigures, Option<FrameWriter<Link>>) {
        let post_copy = Arc::clone(&self.post_copy);
        post_copy.lock().confirm_over(writer);
        loop {
            let received = reader
                .link()
                .wait_for_ever()
                .map_err(|e| DestinationError::from(WireError::from(e)))
                .and_then(|()| post_copy.receive(&mut reader));
            let Err(e) = received else { break };
            reader.link().shutdown(std::net::Shutdown::Both);
            self.faults.leave();
            let left = {
                let mut state = post_copy.lock();
                (state.asks, state.confirms) = (None, None);
                state.missing.left()
            };
            if post_copy.ended.load(Ordering::SeqCst) {
                break;
            }
            tracing::warn!(
                "the connection to the source is gone ({e}); {left} pages of the guest are only there: waiting for it to come back"
            );
            match self.reconnect(machine) {
                Some(again) => reader = again,
                None => break,
            }
        }
        if post_copy.lock().missing.left() > 0 {
            self.stop(machine);
        }
        // Before the channels end: the last words go over it.
        let writer = post_copy.lock().confirms.take();
        self.faults.leave();
        post_copy.channels.close();
        let Self { faults, cold_window, .. } = self;
        drop((faults, cold_window));
        post_copy.pages.release();
        (post_copy.lock().figures(), writer)
    }

    /// Stops a guest that is given up: it is not to see the zeros that are in place of what has not come. Only a vCPU that the
    /// host works for with such a page does, and it has been told to stop: it runs no instruction any more.
    fn stop(&self, machine: &impl DestinationMachine) {
        let until = Instant::now() + STOP_LIMIT;
        while !machine.try_pause() && Instant::now() < until {
            std::thread::sleep(ASK_AGAIN);
        }
        self.post_copy.pages.release();
        if let Err(e) = machine.pause() {
            tracing::warn!("a guest that is given up stops as soon as it can: {e}");
        }
    }

    /// Waits until the two sides have met again; `None` when nothing is needed any more. A guest whose source stays away
    /// is paused meanwhile, but for what waits for a page in the host: that is when the page has come.
    fn reconnect(&mut self, machine: &impl DestinationMachine) -> Option<FrameReader<Link>> {
        let post_copy = Arc::clone(&self.post_copy);
        let (mut is_lost, mut stands, mut ran) = (false, false, false);
        let bulk = loop {
            let limit = if is_lost && !stands { ASK_AGAIN } else { self.source_timeout };
            if let Some((bulk, faults)) = post_copy.channels.take_both(limit) {
                match self.resume(bulk, faults) {
                    Ok(reader) => break reader,
                    Err(e) => tracing::warn!("the new connection is of no use: {e}"),
                }
                continue;
            }
            if post_copy.channels.is_closed() || post_copy.lock().missing.left() == 0 {
                return None;
            }
            if !is_lost {
                is_lost = true;
                ran = machine.is_running();
                post_copy.lock().source_lost = true;
                let status = post_copy.status();
                tracing::error!(
                    "the source has not come back within {:?}: the guest is paused; {} pages are missing, first {:?} (first page, number of pages)",
                    self.source_timeout,
                    status.missing,
                    status.first_missing,
                );
            }
            if !stands {
                stands = machine.try_pause();
            }
        };
        post_copy.lock().source_lost = false;
        if ran {
            machine.resume();
        }
        Some(bulk)
    }

    /// Says what is missing, asks again for what the guest waits for, and goes on over the new connection.
    fn resume(&mut self, bulk: Link, faults: Link) -> Result<FrameReader<Link>, DestinationError> {
        let mut writer = FrameWriter::new(bulk.try_clone().map_err(WireError::from)?);
        let ranges = {
            let mut state = self.post_copy.lock();
            // Those that have landed are said by not being named.
            state.missing.take_unconfirmed();
            state.missing.ranges().collect::<Vec<_>>()
        };
        send_ranges(&ranges, &mut writer, Message::Missing)?;
        self.faults.serve(faults)?;
        self.post_copy.lock().confirm_over(writer);
        Ok(FrameReader::new(bulk))
    }
}
