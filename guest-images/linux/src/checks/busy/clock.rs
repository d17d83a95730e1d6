//! Clocks: none goes back, on no processor, and none behind what another processor has seen of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::{Shared, tsc};
use crate::Outcome;

/// Looks between two pauses.
const BURST: usize = 100;
const PAUSE: Duration = Duration::from_millis(1);

const NAMES: [&str; CLOCKS] = ["CLOCK_MONOTONIC", "CLOCK_BOOTTIME", "CLOCK_REALTIME", "the time stamp counter"];
const CLOCKS: usize = 4;

/// What each clock has shown at most, on any processor.
#[derive(Debug, Default)]
pub(super) struct Latest([AtomicU64; CLOCKS]);

/// What they show: nanoseconds, the counter's its own.
fn read(clock: usize) -> u64 {
    let id = match clock {
        0 => ClockId::Monotonic,
        1 => ClockId::Boottime,
        2 => ClockId::Realtime,
        _ => return tsc::read(),
    };
    let time = clock_gettime(id);
    // None of them is before 1970.
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// Looks until it is over. Finds the longest time between two looks, which a guest that stands does not see end.
pub(super) fn run(processor: usize, latest: &Latest, shared: &Shared) -> Outcome {
    let mut own = [0; CLOCKS];
    let mut gap = 0;
    while !shared.is_over() {
        for _ in 0..BURST {
            let before = own[0];
            for (clock, own) in own.iter_mut().enumerate() {
                *own = look(clock, *own, &latest.0[clock], || read(clock))
                    .map_err(|why| format!("{why} on processor {processor}"))?;
            }
            if before > 0 {
                gap = gap.max(own[0] - before);
            }
        }
        shared.clocks.fetch_add(BURST as u64, Ordering::Relaxed);
        sleep(PAUSE);
    }
    Ok(format!("gap{processor}_ms={}", gap / 1_000_000))
}

/// Looks at a clock once; what it shows.
fn look(clock: usize, own: u64, latest: &AtomicU64, read: impl FnOnce() -> u64) -> Result<u64, String> {
    // Published before it is read here, and so not later.
    let floor = latest.load(Ordering::SeqCst);
    let now = read();
    let name = NAMES[clock];
    if now < own {
        return Err(format!("{name} went back by {} from {own}", own - now));
    }
    if now < floor {
        return Err(format!("{name} is {} behind {floor}, which another processor has shown,", floor - now));
    }
    latest.fetch_max(now, Ordering::SeqCst);
    Ok(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_back_is_told() {
        let latest = AtomicU64::new(0);
        assert_eq!(look(0, 0, &latest, || 10), Ok(10));
        assert_eq!(look(0, 10, &latest, || 10), Ok(10));
        assert!(look(0, 10, &latest, || 9).unwrap_err().contains("went back by 1 from 10"));
    }

    #[test]
    fn a_step_behind_another_processor_is_told() {
        let latest = AtomicU64::new(0);
        assert_eq!(look(3, 0, &latest, || 100), Ok(100));
        assert!(
            look(3, 50, &latest, || 99).unwrap_err().contains("is 1 behind 100, which another processor has shown")
        );
        assert_eq!(latest.into_inner(), 100);
    }

    #[test]
    fn this_machines_clocks_go_on() {
        let latest = Latest::default();
        let shared = Shared::default();
        let found = std::thread::scope(|scope| {
            let looks = scope.spawn(|| run(0, &latest, &shared));
            while shared.clocks.load(Ordering::Relaxed) < 1000 {
                sleep(PAUSE);
            }
            shared.over.store(true, Ordering::Relaxed);
            looks.join().unwrap()
        });
        assert!(found.unwrap().starts_with("gap0_ms="));
    }
}
