//! Rounds of pre-copy: how quickly they go, and so whether another is worth its time. No I/O but the clock.

use std::time::{Duration, Instant};

use memory_agent::PAGE_SIZE;

use super::{Options, SourceError};

/// A round that leaves more than this share of the last one's pages does not shrink any more.
const STILL_SHRINKING: f64 = 0.75;
/// So few pages are not worth another round.
const FEW_PAGES: u64 = 64;
/// A round of fewer bytes measures the round trip, not the link.
const WORTH_MEASURING: u64 = 1 << 20;
const MIB: f64 = (1 << 20) as f64;

/// The rounds so far.
pub(super) struct Rounds {
    count: u32,
    started: Instant,
    bytes_before: u64,
    /// Bytes a second that landed in the last round that had enough of them.
    bandwidth: f64,
    /// Bytes a second that the guest wrote over the last round.
    dirty: u64,
    last_owed: u64,
}

impl Rounds {
    pub(super) fn new() -> Self {
        Self { count: 0, started: Instant::now(), bytes_before: 0, bandwidth: 0.0, dirty: 0, last_owed: u64::MAX }
    }

    /// How many there were, with this one.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Bytes a second that the guest wrote over the last round.
    pub(super) fn dirty_bytes_per_second(&self) -> u64 {
        self.dirty
    }

    /// One begins, with so many bytes sent before it.
    pub(super) fn begin(&mut self, bytes: u64) {
        self.count += 1;
        (self.started, self.bytes_before) = (Instant::now(), bytes);
    }

    /// All of it has landed, with so many bytes sent by now.
    pub(super) fn landed(&mut self, bytes: u64) {
        let sent = bytes - self.bytes_before;
        if sent >= WORTH_MEASURING || self.bandwidth == 0.0 {
            self.bandwidth = sent as f64 / self.started.elapsed().as_secs_f64().max(1e-6);
        }
    }

    /// The guest has written so many pages since this round began.
    pub(super) fn written(&mut self, pages: u64) {
        self.dirty = ((pages * PAGE_SIZE) as f64 / self.started.elapsed().as_secs_f64().max(1e-3)) as u64;
    }

    /// Whether the guest can be stopped now that so many pages are owed; if not, there is to be another round.
    ///
    /// # Errors
    /// When there have been as many as there may be, and the guest would be paused for too long.
    pub(super) fn may_stop(&mut self, owed: u64, options: &Options) -> Result<bool, SourceError> {
        let downtime = self.estimate(owed);
        let is_shrinking = (owed as f64) < self.last_owed as f64 * STILL_SHRINKING;
        let is_last = self.count >= options.max_rounds;
        self.last_owed = owed;
        if downtime <= options.downtime_limit && (owed <= FEW_PAGES || !is_shrinking || is_last) {
            return Ok(true);
        }
        if is_last {
            return Err(SourceError::NotConverging {
                rounds: self.count,
                dirty_mib: self.dirty as f64 / MIB,
                link_mib: self.bandwidth / MIB,
                downtime_ms: downtime.as_millis() as u64,
            });
        }
        Ok(false)
    }

    /// How long it takes to deliver so many pages.
    fn estimate(&self, pages: u64) -> Duration {
        if self.bandwidth <= 0.0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64((pages * PAGE_SIZE) as f64 / self.bandwidth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds over a connection that carries a page a millisecond.
    fn rounds() -> Rounds {
        Rounds { bandwidth: (1000 * PAGE_SIZE) as f64, count: 1, ..Rounds::new() }
    }

    #[test]
    fn a_guest_is_stopped_once_rounds_shrink_no_more_and_it_need_not_stand_for_long() {
        let options = Options { downtime_limit: Duration::from_millis(300), max_rounds: 3, ..Options::default() };
        let mut rounds = rounds();
        assert!(!rounds.may_stop(1000, &options).unwrap(), "it would be paused for a second");
        assert!(!rounds.may_stop(280, &options).unwrap(), "another round would shrink what is left");
        assert!(rounds.may_stop(279, &options).unwrap(), "it would not");
        assert!(self::rounds().may_stop(FEW_PAGES, &options).unwrap(), "so few are not worth a round");
        rounds.count = 3;
        assert!(rounds.may_stop(10, &options).unwrap(), "there may be no more");
        let error = rounds.may_stop(301, &options).unwrap_err();
        assert!(matches!(error, SourceError::NotConverging { rounds: 3, downtime_ms: 301, .. }), "{error}");
    }
}
