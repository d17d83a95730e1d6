//! The thread of post-copy that the guest does not wait for: pages out what is cold.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::PostCopy;
use crate::migration::destination::DestinationError;
use crate::migration::destination::landing::Landed;
use crate::migration::stoppable::Stoppable;
use crate::ram::RamPage;

/// Landed pages that are too few to be confirmed at once, and those that the guest waited for, are confirmed after so long.
const CONFIRMED_AFTER: Duration = Duration::from_millis(20);
/// Pages that are paged out at a time: what the guest wants meanwhile may have to wait for all of them.
const PIECE: u64 = 128;

/// Starts the thread that pages out cold pages as they land, and confirms what nobody else has.
pub(super) fn keep_cold(post_copy: &Arc<PostCopy>, landed: &Landed) -> Result<Stoppable, DestinationError> {
    let (sender, runs) = channel::<Vec<Range<RamPage>>>();
    let (ram, landed) = (Arc::clone(&post_copy.ram), landed.clone());
    post_copy.lock().cold = Some(sender);
    let (post_copy, keeping) = (Arc::clone(post_copy), Arc::clone(post_copy));
    let stop = move || post_copy.lock().cold = None;
    thread(Stoppable::spawn("keep-cold", stop, move || {
        let mut confirmed = Instant::now();
        loop {
            match runs.recv_timeout(CONFIRMED_AFTER) {
                Ok(first) => {
                    keeping.fault_priority.give_way();
                    // With all that have landed meanwhile.
                    let runs = first.into_iter().chain(runs.try_iter().flatten());
                    if let Err(e) = landed.landed(&ram, runs, PIECE) {
                        tracing::warn!("cold pages stay in memory here: {e}");
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if confirmed.elapsed() >= CONFIRMED_AFTER {
                confirmed = Instant::now();
                // When the connection has broken, whoever reads from it sees that.
                let _ = keeping.lock().confirm();
            }
        }
    }))
}

fn thread(started: std::io::Result<Stoppable>) -> Result<Stoppable, DestinationError> {
    started.map_err(|e| DestinationError::Thread(e.to_string()))
}
