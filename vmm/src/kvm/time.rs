//! Time that goes on while a machine is between hosts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A blackout longer than this is a clock that is wrong, not a migration.
const LONGEST_BLACKOUT: Duration = Duration::from_secs(3600);

/// Wall-clock time, nanoseconds since 1970.
pub(super) fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// The time stamp counter `saved_at_ns` held `saved`; what it would hold at `now_ns` had it gone on at `khz`.
///
/// Hosts whose clocks disagree so that time would go backwards, or by more than an hour, get the saved value.
pub(super) fn advanced_tsc(saved: u64, khz: u32, saved_at_ns: u64, now_ns: u64) -> u64 {
    match now_ns.checked_sub(saved_at_ns).map(Duration::from_nanos) {
        Some(blackout) if blackout <= LONGEST_BLACKOUT => {
            saved.wrapping_add((blackout.as_nanos() * u128::from(khz) / 1_000_000) as u64)
        }
        _ => saved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_and_never_back() {
        assert_eq!(advanced_tsc(1000, 2_000_000, 0, 1_000_000), 1000 + 2_000_000);
        assert_eq!(advanced_tsc(1000, 2_000_000, 500, 400), 1000);
        assert_eq!(advanced_tsc(1000, 2_000_000, 0, u64::MAX), 1000);
    }
}
