//! What people and metrics see of a migration.

use std::time::{Duration, Instant};

use memory_agent::Counts;
use serde::{Deserialize, Serialize};

use super::downtime::Downtime;
use super::plan::{ColdPolicy, Owed};

/// What the source is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Connecting and agreeing.
    Negotiating,
    /// Sending resident pages while the guest runs.
    Hot,
    /// Sending cold pages, a window at a time, while the guest runs.
    Cold,
    /// Sending what the guest wrote meanwhile.
    Converging,
    /// The guest is paused: the last pages and the state.
    Switchover,
    /// The guest runs at the destination; what is left comes when it is touched, and at a bounded rate.
    PostCopy,
    /// As before, without a connection: nothing is sent until there is one.
    PostCopyPaused,
    /// The guest runs at the destination, which pages out what was cold.
    PagingOut,
}

/// Pages by how they were delivered the first time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesByClass {
    /// Never written: travelled as ranges, never read.
    pub hole: u64,
    /// Resident, with nothing but zeros in them: travelled as ranges.
    pub zero: u64,
    /// Warm.
    pub hot: u64,
    /// Swapped.
    pub cold: u64,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Round of pre-copy, from 1.
    pub round: u32,
    /// Milliseconds since the start.
    pub elapsed_ms: u64,
    /// Bytes on the wire so far.
    pub bytes_sent: u64,
    /// Bytes a second on the wire, over the last second or so.
    pub bytes_per_second: u64,
    /// Bytes a second that the guest writes anew, over the last round.
    pub dirty_bytes_per_second: u64,
    /// Pages delivered so far, by class.
    pub pages: PagesByClass,
    /// Pages sent again because the guest wrote them.
    pub resent: u64,
    /// Warm pages still owed.
    pub owed_hot: u64,
    /// Cold pages still owed.
    pub owed_cold: u64,
    /// Pages in all.
    pub pages_total: u64,
    /// Estimate of the time left, milliseconds; `None` while it cannot be told.
    pub left_ms: Option<u64>,
    /// What post-copy has sent so far.
    #[serde(default)]
    pub post_copy: Option<PostCopyReport>,
}

impl Progress {
    /// Before anything has been done for a machine of so many pages.
    pub(crate) fn at_start(pages_total: u64) -> Self {
        Self {
            phase: Phase::Negotiating,
            round: 0,
            elapsed_ms: 0,
            bytes_sent: 0,
            bytes_per_second: 0,
            dirty_bytes_per_second: 0,
            pages: PagesByClass::default(),
            resent: 0,
            owed_hot: 0,
            owed_cold: 0,
            pages_total,
            left_ms: None,
            post_copy: None,
        }
    }
}

/// How residency changed at the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceResidency {
    /// Resident pages before.
    pub resident_before: u64,
    /// The most resident pages seen at any time.
    pub resident_peak: u64,
    /// Resident pages afterwards.
    pub resident_after: u64,
    /// Swapped pages before.
    pub swapped_before: u64,
    /// Swapped pages afterwards.
    pub swapped_after: u64,
}

/// How long a guest waited for pages that were not there, by the destination's clock: from its fault to the page's landing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultFigures {
    /// Pages it waited for.
    pub count: u64,
    /// Median, microseconds.
    pub p50_us: u64,
    /// 99 of 100 were quicker, microseconds.
    pub p99_us: u64,
    /// The longest, microseconds.
    pub max_us: u64,
    /// Holes that it touched meanwhile and that were filled with zeros without asking the source.
    pub holes: u64,
}

/// What post-copy sent, in pages of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostCopyReport {
    /// Pages that were left at switchover.
    pub pages: u64,
    /// Pages sent because the guest waited for them.
    pub requested: u64,
    /// Pages sent along with these.
    pub neighbours: u64,
    /// Pages sent unasked.
    pub background: u64,
    /// Bytes of them given back to this host so far, as soon as the destination had confirmed them.
    pub given_back: u64,
    /// Pages that cannot be read here: they are tried again and again.
    #[serde(default)]
    pub unreadable: u64,
    /// Pages that were not needed any more when the guest ended there.
    pub needless: u64,
    /// How often the connection broke and was made anew.
    pub cuts: u32,
    /// Milliseconds from the guest's going on there to the last page's confirmation.
    pub ms: u64,
    /// How long the guest waited; `None` when the destination did not say.
    pub faults: Option<FaultFigures>,
}

/// What a migration that succeeded was like. Page counts are in pages of 4 KiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What happened to cold pages.
    pub cold_policy: ColdPolicy,
    /// The probe that told what each page was at the beginning.
    pub classed_by: String,
    /// From the connection to the guest running at the destination, milliseconds.
    pub total_ms: u64,
    /// From the guest's stop here to its going on there, microseconds.
    pub downtime_us: u64,
    /// Where that time went.
    #[serde(default)]
    pub downtime: Downtime,
    /// Rounds of pre-copy.
    pub rounds: u32,
    /// Bytes on the wire.
    pub bytes_sent: u64,
    /// Pages by class.
    pub pages: PagesByClass,
    /// Pages sent again because the guest wrote them.
    pub resent: u64,
    /// Pages swapped in on this host meanwhile, by anyone.
    pub swap_ins: u64,
    /// Pages swapped out on this host meanwhile, by anyone.
    pub swap_outs: u64,
    /// Pages swapped in on this host before the guest went, by anyone.
    pub swap_ins_before_switchover: u64,
    /// Residency here.
    pub source: SourceResidency,
    /// What guest RAM is at the destination, once it has paged out what was cold; `None` when it did not say.
    pub destination: Option<Counts>,
    /// Milliseconds the destination needed for that after the guest ran.
    pub page_out_ms: u64,
    /// What post-copy sent, when anything was to.
    #[serde(default)]
    pub post_copy: Option<PostCopyReport>,
}

/// Whoever wants to see progress.
pub trait Observer {
    /// Something has changed. Called often; whoever shows it chooses when.
    fn progress(&mut self, progress: &Progress);
}

impl<F: FnMut(&Progress)> Observer for F {
    fn progress(&mut self, progress: &Progress) {
        self(progress);
    }
}

/// Over how long a rate is averaged.
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// Keeps the snapshot up to date, and shows it.
pub(super) struct Tracker<'o> {
    observer: &'o mut dyn Observer,
    started: Instant,
    rate_since: (Instant, u64),
    /// What is shown.
    pub(super) now: Progress,
}

impl<'o> Tracker<'o> {
    pub(super) fn new(pages_total: u64, observer: &'o mut dyn Observer) -> Self {
        let started = Instant::now();
        Self { observer, started, rate_since: (started, 0), now: Progress::at_start(pages_total) }
    }

    /// Takes over what changes all the time, and shows how far it is.
    pub(super) fn show(&mut self, bytes_sent: u64, owed: Owed) {
        self.now.bytes_sent = bytes_sent;
        self.now.elapsed_ms = self.started.elapsed().as_millis() as u64;
        (self.now.owed_hot, self.now.owed_cold) = (owed.hot, owed.cold);
        let (since, bytes) = self.rate_since;
        let over = since.elapsed();
        if over >= RATE_WINDOW || self.now.bytes_per_second == 0 && over >= RATE_WINDOW / 10 {
            self.now.bytes_per_second = ((bytes_sent - bytes) as f64 / over.as_secs_f64()) as u64;
            self.rate_since = (Instant::now(), bytes_sent);
        }
        let owed_bytes = (owed.hot + owed.cold) * memory_agent::PAGE_SIZE;
        self.now.left_ms = (owed_bytes * 1000).checked_div(self.now.bytes_per_second);
        self.observer.progress(&self.now);
    }
}
