//! The targets, and the figures that are held against them.

use super::verdict::Verdict;
use super::{EAGER, LAZY, MOVE, floor, rewrite, touch};
use crate::table::Row;

/// Switchover, as a share of that of a migration that swaps everything in first.
const OF_EAGER: f64 = 0.35;
const OF_PRE_COPY: f64 = 0.2;
/// A wait, as a multiple of what it takes at least.
const P50_OF_FLOOR: f64 = 1.5;
const P99_OF_FLOOR: f64 = 5.0;
/// The 99th percentile while everything else is sent as quickly as possible, as a multiple of that while hardly anything does.
const P99_UNLIMITED: f64 = 2.0;
/// By how much residency may be other than it should, as a share.
const RESIDENCY: f64 = 0.02;
/// How many times as long as carrying the memory once the move of a guest may take that never stops writing.
const REWRITE: f64 = 3.0;

/// A verdict for each target of which there are figures.
pub(super) fn all(rows: &[Row], pre_copy: &str) -> Vec<Verdict> {
    let rows = Rows(rows);
    let mut verdicts = Vec::new();
    for lazy in LAZY {
        verdicts.extend(of_move(rows, lazy, pre_copy).into_iter().flatten());
    }
    verdicts.extend(of_touch(rows).into_iter().flatten());
    verdicts.extend(of_rewrite(rows).into_iter().flatten());
    verdicts
}

#[derive(Clone, Copy)]
struct Rows<'r>(&'r [Row]);

impl Rows<'_> {
    fn value(self, mode: &str, subject: &str, key: &str) -> Option<f64> {
        self.0.iter().find(|row| row.mode == mode && row.subject == subject)?.values.get(key).copied()
    }
}

fn of_move(rows: Rows<'_>, lazy: &str, pre_copy: &str) -> Vec<Option<Verdict>> {
    let of = |subject, key| rows.value(MOVE, subject, key);
    let swap_ins = of(lazy, "swap_ins_before_switchover").map(|figure| {
        Verdict::exactly(format!("{lazy}: pages swapped in before the switchover"), figure, 0.0)
            .noting("the whole host's counter, with this benchmark and the guest at work besides the monitors")
    });
    let share = |peer, name: &str, target| {
        let share = of(lazy, "switchover_ms")? / of(peer, "switchover_ms")?;
        Some(Verdict::at_most(format!("{lazy}: switchover, share of {name}'s"), share, target))
    };
    let resident = || {
        let expected = of(lazy, "source_resident_before")? + of(lazy, "faults")?;
        let off = (of(lazy, "destination_resident")? - expected).abs() / expected;
        let what = format!("{lazy}: destination residency off the source's and what was touched since, share");
        Some(Verdict::at_most(what, off, RESIDENCY))
    };
    let left = |key, name| {
        let what = format!("{lazy}: {name} at the source after post-copy, pages");
        of(lazy, key).map(|pages| Verdict::exactly(what, pages, 0.0))
    };
    vec![
        swap_ins,
        share(EAGER, "eager", OF_EAGER),
        share(pre_copy, "QEMU pre-copy", OF_PRE_COPY),
        resident(),
        left("source_resident_after", "resident"),
        left("source_swapped_after", "swapped"),
    ]
}

fn of_touch(rows: Rows<'_>) -> Vec<Option<Verdict>> {
    let of = |subject, key| rows.value(touch::MODE, subject, key);
    // At the rhythm of the touches.
    let floor = |subject| {
        let (round_trip, swap_in) = match subject {
            touch::APART => ("round_trip_apart_us", "swap_in_apart_us"),
            _ => ("round_trip_us", "swap_in_us"),
        };
        Some(of(floor::SUBJECT, round_trip)? + of(floor::SUBJECT, swap_in)?)
    };
    let of_floor = |subject, key, name: &str, target| {
        let (floor, wait) = (floor(subject)?, of(subject, key)?);
        let what = format!("{subject}: {name} of a cold page, times a round trip and a swap-in");
        Some(Verdict::at_most(what, wait / floor, target).noting(format!("{wait:.0} us to {floor:.1} us")))
    };
    let unlimited = || {
        let (slow, quick) = (of(touch::SLOW, "fault_p99_us")?, of(touch::UNLIMITED, "fault_p99_us")?);
        let what = format!("{}: p99 of a cold page, times that of {}", touch::UNLIMITED, touch::SLOW);
        Some(Verdict::at_most(what, quick / slow, P99_UNLIMITED).noting(format!("{quick:.0} us to {slow:.0} us")))
    };
    let mut verdicts: Vec<_> = [touch::SLOW, touch::APART]
        .into_iter()
        .flat_map(|subject| {
            [
                of_floor(subject, "fault_p50_us", "p50", P50_OF_FLOOR),
                of_floor(subject, "fault_p99_us", "p99", P99_OF_FLOOR),
            ]
        })
        .collect();
    verdicts.push(unlimited());
    verdicts
}

fn of_rewrite(rows: Rows<'_>) -> Vec<Option<Verdict>> {
    let of = |subject, key| rows.value(rewrite::MODE, subject, key);
    let now = || {
        let times = of(rewrite::NOW, "total_ms")? / of(rewrite::NOW, "link_ms")?;
        let what = "a guest that writes faster than the link, --switchover now: times carrying its memory once";
        Some(Verdict::at_most(what, times, REWRITE))
    };
    let refused = of(rewrite::PRE_COPY, "exit_code").map(|code| {
        Verdict::exactly("the same, plain pre-copy: exit code", code, rewrite::NOT_CONVERGING)
            .noting("which says that it does not converge")
    });
    vec![now(), refused]
}
