//! What is cold stays cold, what was never written stays a hole, and the source does not grow.

use anyhow::{Context, Result, ensure};
use memory_agent::{Counts, KernelOffer, ProbeKind};
use thermocline::control::Request;
use thermocline_tests::console::eventually;
use thermocline_tests::owner::destination_only;
use thermocline_tests::process::EMULATED;
use thermocline_tests::residency::{GuestMemory, must_be_near};
use thermocline_tests::swap::{self, undisturbed};
use thermocline_tests::trials::unless_the_emulator_fails;
use thermocline_tests::{How, Machine, Migrated, Sandbox, Trials, Workload, trial};
use workload_guest::command::Command;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], holes_stay_holes_on_both_sides);
    trial!(trials, [Kvm], a_busy_guest_takes_its_memory_at_once);
    trial!(trials, [Kvm, Root, Zram], paced_leaves_both_sides_as_they_were);
    trial!(trials, [Kvm, Root, Zram], cold_stays_cold_whichever_probe_tells);
    trial!(trials, [Kvm, Root, Zram], swap_goes_away_while_cold_pages_move);
    trial!(trials, [Kvm, Root, Zram], eager_wakes_everything);
    trial!(trials, [Kvm, Root, Zram], cold_pages_stay_cold_there_and_back);
    trial!(trials, [Kvm, Root, Zram], a_cold_migration_given_up_leaves_the_source_as_it_was);
}

/// Three quarters of the memory cold; less of it where every page takes long.
pub(crate) const COLD: Workload = if EMULATED {
    Workload { memory: 64, working_set: 8, cold: 48, rate: 200, writes: 50, cpus: 1 }
} else {
    Workload { memory: 256, working_set: 40, cold: 192, rate: 2000, writes: 50, cpus: 1 }
};
/// `--window`, in pages.
const WINDOW: u64 = 1024;
/// Pages that may be on their way while the window is paged out: a batch, and what per-CPU lists hold back.
const UNDER_WAY: u64 = 256 + 64;

/// A guest with its cold pages paged out; its memory, and what that is.
pub(crate) fn boot_cold(sandbox: &Sandbox) -> Result<(Machine, GuestMemory, Counts)> {
    boot_cold_with(sandbox, &[])
}

/// The same with more options of `thermocline run`.
fn boot_cold_with(sandbox: &Sandbox, more: &[&str]) -> Result<(Machine, GuestMemory, Counts)> {
    let source = sandbox.boot_with(more, &COLD)?;
    source.page_out_cold(&source.console.ready()?)?;
    source.console.must_run()?;
    let memory = GuestMemory::of(&source)?;
    let before = memory.counts()?;
    must_be_near("swapped to begin with", before.swapped, COLD.cold << 8, 2)?;
    Ok((source, memory, before))
}

struct Moved {
    before: Counts,
    /// Extremes at the source.
    peak: Counts,
    /// At the destination, right behind the end, and its extremes.
    after: Counts,
    migrated: Migrated,
    destination: Machine,
}

fn migrate_cold(sandbox: &Sandbox, how: &How) -> Result<Moved> {
    move_cold(sandbox, boot_cold(sandbox)?, how)
}

fn move_cold(sandbox: &Sandbox, (source, memory, before): (Machine, GuestMemory, Counts), how: &How) -> Result<Moved> {
    let destination = sandbox.receive(&COLD)?;
    let sampler = memory.watch();
    let migration = source.migrate(&destination.address, how)?;
    let migrated = migration.succeeds()?;
    let peak = sampler.peak()?;
    let after = GuestMemory::of(&destination.machine)?.counts()?;
    ensure!(source.process.wait()?.code() == Some(0), "the source failed");
    Ok(Moved { before, peak, after, migrated, destination: destination.machine })
}

fn holes_stay_holes_on_both_sides() -> Result<()> {
    for cold in ["paced", "eager"] {
        let sandbox = Sandbox::new()?;
        let workload = Workload { memory: 256, ..Workload::default() };
        let source = sandbox.boot(&workload)?;
        // Whatever it writes at its start is written by then.
        source.console.must_run()?;
        let memory = GuestMemory::of(&source)?;
        let before = memory.counts()?;
        ensure!(before.hole > 200 << 8, "the guest touches what it should not: {before:?}");
        let destination = sandbox.receive(&workload)?;
        let mut there = destination.machine;
        let sampler = memory.watch();
        let migrated = source.migrate(&destination.address, &How::with(&["--cold", cold]))?.succeeds()?;
        let least = sampler.peak()?.hole;
        ensure!(least == before.hole, "{cold}: the source had {} holes, then {least}", before.hole);
        let after = GuestMemory::of(&there)?.counts()?;
        // Pages of zeros become holes; none the other way round.
        let expected = before.hole + migrated.report.pages.zero;
        ensure!(after.hole.abs_diff(expected) <= 8, "{cold}: {} holes there, not {expected}", after.hole);
        ensure!(after.hole >= before.hole, "{cold}: {} holes became {}", before.hole, after.hole);
        ensure!(migrated.report.pages.hole.abs_diff(before.hole) <= 8, "{:?}", migrated.report);
        destination_only(&source, &mut there)?;
    }
    Ok(())
}

/// The trials here count holes while the guest works: it must not come upon memory that it has not taken yet.
fn a_busy_guest_takes_its_memory_at_once() -> Result<()> {
    let sandbox = Sandbox::new()?;
    // As much as it can do: it never waits for an interrupt.
    let mut machine = sandbox.boot(&Workload { rate: 0, ..Workload::default() })?;
    machine.console.must_run()?;
    let memory = GuestMemory::of(&machine)?;
    let before = memory.counts()?;
    machine.console.tell(Command::Stop)?;
    machine.console.report()?;
    let after = memory.counts()?;
    ensure!(after.hole == before.hole, "{before:?} became {after:?} when it rested");
    Ok(())
}

fn paced_leaves_both_sides_as_they_were() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        migrate_cold(&sandbox, &How::with(&["--window", "4MiB"]))?.must_be_as_before()
    })
}

impl Moved {
    /// Checks that both sides are as warm and as cold as the source was, and that all of the guest is there.
    fn must_be_as_before(&mut self) -> Result<()> {
        let Self { before, peak, after, migrated, destination } = self;
        let report = &migrated.report;
        let most = before.resident + WINDOW + UNDER_WAY;
        ensure!(peak.resident <= most, "the source grew from {} to {} pages", before.resident, peak.resident);
        ensure!(report.source.resident_peak <= most, "by its own account: {report:?}");
        must_be_near("source resident afterwards", report.source.resident_after, before.resident, 2)?;
        must_be_near("source swapped afterwards", report.source.swapped_after, before.swapped, 2)?;
        must_be_near("destination resident", after.resident, before.resident, 2)?;
        must_be_near("destination swapped", after.swapped, before.swapped, 2)?;
        let told = report.destination.context("the destination's residency is not told")?;
        must_be_near("destination resident, as told", told.resident, after.resident, 2)?;
        must_be_near("destination swapped, as told", told.swapped, after.swapped, 2)?;
        must_be_near("cold pages sent", report.pages.cold, before.swapped, 2)?;
        // All of it is whole, which swaps it in.
        destination.must_go_on()
    }
}

/// Names the probes that the kernel under test is known to have, so that none is left out unnoticed.
const PROBES: &str = "THERMOCLINE_TESTS_PROBES";

fn cold_stays_cold_whichever_probe_tells() -> Result<()> {
    let offer = KernelOffer::of_this_host();
    let all = [ProbeKind::PageCache, ProbeKind::ExactScan, ProbeKind::Marker, ProbeKind::UffdMarker];
    let known = std::env::var(PROBES).unwrap_or_default();
    for kind in all {
        if let Some(why) = offer.why_not(kind) {
            ensure!(!known.split_whitespace().any(|name| name == kind.name()), "{kind}: {why}");
            println!("not with {kind}: {why}");
            continue;
        }
        let attempt = || {
            let sandbox = Sandbox::new()?;
            let cold = boot_cold_with(&sandbox, &["--probe", kind.name(), "--agent-budget", "50"])?;
            // It has to have seen the pages swapped.
            let rounds = || Ok::<_, anyhow::Error>(cold.0.status()?.agent.context("no agent")?.cost.rounds);
            let until = rounds()? + 2;
            eventually("the agent looks again", || Ok(rounds()? >= until))?;
            let mut moved = move_cold(&sandbox, cold, &How::with(&["--window", "4MiB"]))?;
            let told_by = &moved.migrated.report.classed_by;
            ensure!(told_by == kind.name(), "told by {told_by}, not by {kind}");
            moved.must_be_as_before().with_context(|| kind.to_string())
        };
        undisturbed(|| unless_the_emulator_fails(attempt))?;
    }
    Ok(())
}

fn swap_goes_away_while_cold_pages_move() -> Result<()> {
    unless_the_emulator_fails(|| {
        swap::open().map_err(anyhow::Error::msg)?;
        let sandbox = Sandbox::new()?;
        let (source, _, before) = boot_cold(&sandbox)?;
        let destination = sandbox.receive(&COLD)?;
        let migration = source.migrate(&destination.address, &How::with(&["--window", "4MiB"]))?;
        migration.wait_for(|progress| progress.pages.cold > 4 * WINDOW)?;
        swap::close().map_err(anyhow::Error::msg)?;
        let migrated = migration.succeeds()?;
        let classes = migrated.report.pages;
        must_be_near("cold pages sent", classes.cold + classes.hot, before.swapped + before.resident, 2)?;
        let mut there = destination.machine;
        destination_only(&source, &mut there)
    })
}

fn eager_wakes_everything() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let mut moved = migrate_cold(&sandbox, &How::with(&["--cold", "eager"]))?;
        let Moved { before, peak, after, migrated, destination } = &mut moved;
        let data = before.resident + before.swapped;
        must_be_near("destination resident", after.resident, data, 1)?;
        must_be_near("source resident at its peak", peak.resident, data, 1)?;
        ensure!(after.swapped < 64, "swapped at the destination: {after:?}");
        ensure!(peak.hole == before.hole, "holes became pages at the source: {before:?} {peak:?}");
        ensure!(migrated.report.source.swapped_after < 64, "{:?}", migrated.report);
        destination.must_go_on()
    })
}

fn cold_pages_stay_cold_there_and_back() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let (mut here, _, before) = boot_cold(&sandbox)?;
        for time in 0..3 {
            let destination = sandbox.receive(&COLD)?;
            here.migrate(&destination.address, &How::with(&["--window", "4MiB"]))?.succeeds()?;
            here.process.wait()?;
            here = destination.machine;
            let now = GuestMemory::of(&here)?.counts()?;
            must_be_near(&format!("swapped after {time}"), now.swapped, before.swapped, 3)?;
            must_be_near(&format!("resident after {time}"), now.resident, before.resident, 3)?;
            // A page of zeros is a hole after its first journey.
            ensure!(now.hole >= before.hole, "holes became pages: {before:?} {now:?}");
        }
        here.must_go_on()
    })
}

fn a_cold_migration_given_up_leaves_the_source_as_it_was() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let (mut source, memory, before) = boot_cold(&sandbox)?;
        let destination = sandbox.receive(&COLD)?;
        let migration = source.migrate(&destination.address, &How::with(&["--window", "4MiB"]))?;
        migration.wait_for(|progress| progress.pages.cold > 4 * WINDOW)?;
        source.ask(&Request::CancelMigration {})?;
        migration.fails(19)?;
        // The window that was resident is paged out when the migration lets go of it.
        eventually("the source is as cold as before", || {
            Ok(must_be_near("", memory.counts()?.resident, before.resident, 2).is_ok())
        })?;
        source.must_go_on()
    })
}
