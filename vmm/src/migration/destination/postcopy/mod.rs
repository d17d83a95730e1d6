//! Post-copy: what comes once the guest runs here.
//!
//! Whoever touches a page that has not landed waits, and the source is asked for it over a channel of its own; all other
//! pages come as the source sends them. A page lands once: what the guest has written since is never overwritten. Without a
//! connection those vCPUs wait that need a page, and the others run; when the source does not come back, the guest is paused.

mod faults;
mod landing;
mod receiver;
mod threads;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

pub(super) use receiver::Receiver;

use crate::migration::channels::Channels;
use crate::migration::fault_priority::FaultPriority;
use crate::migration::link::Link;
use crate::migration::plan::Missing;
use crate::migration::progress::FaultFigures;
use crate::migration::wire::message::send_ranges;
use crate::migration::wire::{FrameWriter, Message, WireError};
use crate::ram::{GuestRam, MissingPages, RamPage};
use memory_agent::PageRange;

/// The longest wait that is told apart, microseconds.
const LONGEST_US: u64 = 3_600_000_000;
/// How long to leave alone what could not be done, for want of memory as a rule, before it is tried again: the guest waits
/// meanwhile.
const AGAIN_AFTER: Duration = Duration::from_millis(20);
/// Ranges of missing pages that are shown.
const SHOWN_RANGES: usize = 8;

/// What is still to come, for people and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostCopyStatus {
    /// Pages that have not come.
    pub missing: u64,
    /// The first of them, as first page and number of pages.
    pub first_missing: Vec<(RamPage, u64)>,
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
    since: HashMap<RamPage, Instant>,
    waits_us: Histogram<u32>,
    holes: u64,
    /// Where pages are asked for, while there is a connection.
    asks: Option<FrameWriter<Link>>,
    /// Where landed pages are confirmed, once the guest is ours.
    confirms: Option<FrameWriter<Link>>,
    /// Takes cold pages that have landed to the thread that pages them out: a page that the guest waits for does not wait for
    /// that.
    cold: Option<Sender<Vec<Range<RamPage>>>>,
    source_lost: bool,
    stage: Stage,
    /// The channel over which pages are asked for has ended, and no other has taken its place.
    has_lost_faults: bool,
}

/// Whether the guest can be ours yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is being restored: the host may touch its memory for that, and waits for what has not come.
    Restoring,
    /// It is restored, and is ours once the source says so.
    Restored,
    /// What the host waited for does not come: it is not restored, and never ours.
    Failed,
}

/// The destination's side of post-copy.
pub struct PostCopy {
    ram: Arc<GuestRam>,
    pages: Arc<dyn MissingPages>,
    channels: Arc<Channels>,
    state: Mutex<State>,
    /// Of the guest, over whoever lands and pages out what it does not wait for.
    fault_priority: FaultPriority,
    /// The guest has ended or is to: nothing is needed any more.
    ended: AtomicBool,
}

impl std::fmt::Debug for PostCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostCopy").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl PostCopy {
    /// What is still to come.
    pub fn status(&self) -> PostCopyStatus {
        let state = self.lock();
        let missing = &state.missing;
        PostCopyStatus {
            missing: missing.left(),
            first_missing: missing.ranges().take(SHOWN_RANGES).map(|r| (r.start, r.page_count())).collect(),
            waited_for: missing.requested(),
            connected: state.asks.is_some(),
            source_lost: state.source_lost,
            faults: state.figures(),
        }
    }

    /// All pages that have not come.
    pub fn missing(&self) -> Vec<Range<RamPage>> {
        self.lock().missing.ranges().collect()
    }

    /// Where the two sides meet again.
    pub fn channels(&self) -> &Arc<Channels> {
        &self.channels
    }

    /// The guest has ended: tells the source that nothing is needed any more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(writer) = &mut self.lock().confirms {
            // A source that is away tries to come back, and finds nobody.
            let _ = Message::Ended.send(writer);
        }
        self.channels.close();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// From now on what has landed is confirmed over this. Where the other channel has ended already this one is over, too, and
    /// whoever receives from it sees that.
    fn confirm_over(&mut self, mut writer: FrameWriter<Link>) {
        if self.has_lost_faults {
            writer.link().shutdown(std::net::Shutdown::Both);
        }
        self.confirms = Some(writer);
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
