//! The threads of a tail: who answers connections, handles faults, lands what is waited for, and pages out what is cold.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::Tail;
use crate::migration::destination::DestinationError;
use crate::migration::destination::landing::Landed;
use crate::migration::link::{Link, Listener};
use crate::migration::rendezvous::Rendezvous;
use crate::migration::stoppable::Stoppable;
use crate::migration::wire::message::send_ranges;
use crate::migration::wire::{FrameReader, FrameWriter, Message, WireError};
use crate::ram::MissingRam;

/// Landed pages that are too few to be confirmed at once are confirmed after so long.
const CONFIRMED_AFTER: Duration = Duration::from_millis(20);

/// Answers whoever connects, until the rendezvous is closed.
pub(in super::super) fn open_door(
    rendezvous: &Arc<Rendezvous>,
    listener: Listener,
) -> Result<Stoppable, DestinationError> {
    let (server, closer) = (Arc::clone(rendezvous), Arc::clone(rendezvous));
    thread(Stoppable::spawn("tail-door", move || closer.close(), move || server.serve(&listener)))
}

/// Starts the thread that pages out cold pages as they land, and confirms what nobody else has.
pub(super) fn keep_cold(tail: &Arc<Tail>, landed: &Landed) -> Result<Stoppable, DestinationError> {
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

/// Starts the thread that hears of the guest's faults.
pub(super) fn handle_faults(tail: &Arc<Tail>, missing: &Arc<MissingRam>) -> Result<Stoppable, DestinationError> {
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
pub(super) fn serve_channel(
    tail: &Arc<Tail>,
    missing: &Arc<MissingRam>,
    link: Link,
) -> Result<Stoppable, DestinationError> {
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
