//! One migration of one subject, looked at from outside.

pub(crate) mod columns;
mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
pub(crate) use common::Common;
use memory_agent::{PAGE_SIZE, SwapCounters};
use workload_guest::{Command, Options};

use crate::subject::{Faults, GuestSpec, Migrated, Subject};
use crate::{sampler, stop};

/// How long the guest works before it is migrated.
pub(crate) const WORK: Duration = Duration::from_secs(1);
/// How long the guest's reports are taken in at the destination: more than two of them.
const WATCH: Duration = Duration::from_millis(500);

/// Bytes in a MiB.
pub(crate) const MIB: u64 = 1 << 20;
/// Memory that is neither working set nor cold: the image, the table of generations, alignment, firmware's tables.
pub(crate) const MARGIN_MIB: u64 = 16;
/// The most memory of a machine that has all of it in one piece, with every subject.
pub(crate) const MOST_MIB: u64 = 2048;
/// Page operations a second of a guest that works moderately; half of them write.
const MODERATE: u64 = 2000;

/// A machine of which this share is to be swapped out, and that works on the rest.
pub(crate) fn mostly_cold(mib: u64, cold: f64) -> GuestSpec {
    let cold = ((mib as f64 * cold) as u64).min(mib - MARGIN_MIB);
    let working_set = (mib - MARGIN_MIB - cold).max(1);
    let workload = Options { working_set: working_set * MIB, cold: cold * MIB, rate: MODERATE, ..Options::default() };
    GuestSpec { mib, workload }
}

/// What becomes of the guest before it is migrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// Its cold pages are paged out, and it works on the others.
    PageOut,
    /// It rests.
    Rest,
}

/// Boots, migrates, counts, and only then has the guest check every page, which swaps them in.
pub(crate) fn measure(
    subject: &dyn Subject,
    machine: &GuestSpec,
    before: Before,
    folder: &Path,
) -> Result<BTreeMap<&'static str, f64>> {
    let source = subject.run(folder, machine)?;
    let (_, ready) = source.console.ready()?;
    let destination = subject.receive(folder, machine)?;
    let source_ram = source.ram()?;
    match before {
        Before::PageOut => source_ram.page_out(&ready.cold)?,
        Before::Rest => source.console.send(Command::Stop)?,
    }
    stop::sleep(WORK)?;
    source.console.send(Command::ResetStall)?;

    let before = source_ram.counts()?;
    let overhead = source.process.overhead_kib();
    let cpu = |process: &crate::process::Process| process.cpu_time();
    let cpu_before = (cpu(&source.process)?, cpu(&destination.process)?);
    let swap_before = SwapCounters::read()?;
    let (migrated, peaks) = sampler::during(&source_ram, source.process.pid(), destination.process.pid(), || {
        subject.migrate(&source, &destination, &mut || Ok(()))
    })?;
    let swap = SwapCounters::read()?.since(&swap_before);
    let cpu_after = (cpu(&source.process)?, cpu(&destination.process)?);

    let after = source_ram.counts()?;
    let destination_ram = destination.ram()?;
    let there = destination_ram.counts()?;
    subject.release(&source)?;
    let seen = destination.console.watch(WATCH)?;
    let all = destination.console.check()?;
    let errors = seen.errors.max(all.errors);
    ensure!(errors == 0, "{errors} pages are not what the guest wrote");
    let written = (machine.workload.working_set + machine.workload.cold) / PAGE_SIZE;
    ensure!(all.pages == written, "the guest found {} pages instead of {written}", all.pages);

    let mut values = BTreeMap::from([
        ("total_ms", ms(migrated.total)),
        ("downtime_ms", ms(migrated.downtime)),
        ("guest_stall_us", seen.longest_stall_us as f64),
        ("swap_ins", swap.swap_ins as f64),
        ("swap_outs", swap.swap_outs as f64),
        ("source_resident_before", before.resident as f64),
        ("source_resident_peak", peaks.source_resident.max(before.resident) as f64),
        ("source_resident_after", after.resident as f64),
        ("source_swapped_after", after.swapped as f64),
        ("destination_resident", there.resident as f64),
        ("destination_swapped", there.swapped as f64),
        ("cpu_ms_source", ms(cpu_after.0.saturating_sub(cpu_before.0))),
        ("cpu_ms_destination", ms(cpu_after.1.saturating_sub(cpu_before.1))),
        ("errors", errors as f64),
        ("overhead_kib", overhead.unwrap_or_default() as f64),
        ("overhead_peak_kib_source", peaks.source_overhead_kib as f64),
        ("overhead_peak_kib_destination", peaks.destination_overhead_kib as f64),
    ]);
    if !migrated.helpers_cpu.is_zero() {
        values.insert("cpu_ms_guard", ms(migrated.helpers_cpu));
    }
    values.extend(of_switchover(&migrated));
    Ok(values)
}

/// Figures of the switchover and of what post-copy sent.
pub(crate) fn of_switchover(migrated: &Migrated) -> BTreeMap<&'static str, f64> {
    let mut values = BTreeMap::from([
        ("switchover_ms", ms(migrated.switchover)),
        ("swap_ins_before_switchover", migrated.swap_ins_before_switchover as f64),
    ]);
    if let Some(post_copy) = migrated.post_copy {
        values.insert("tail_ms", ms(post_copy.time));
        values.extend(post_copy.faults.iter().flat_map(of_faults));
    }
    values
}

/// How long the guest waited. Without any wait there are no percentiles.
pub(crate) fn of_faults(faults: &Faults) -> BTreeMap<&'static str, f64> {
    let mut values = BTreeMap::from([("faults", faults.count as f64)]);
    if faults.count > 0 {
        values.extend([
            ("fault_p50_us", faults.p50_us as f64),
            ("fault_p99_us", faults.p99_us as f64),
            ("fault_max_us", faults.max_us as f64),
        ]);
    }
    values
}

/// In milliseconds.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
