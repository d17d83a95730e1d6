//! Guests that are switched over at once, and whose cold memory comes by post-copy.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::network::{Network, SECOND};
use rustix::process::Signal;
use thermocline::control::RunState;
use thermocline::dump::DumpReport;
use thermocline::migration::progress::Phase;
use thermocline_tests::console::eventually;
use thermocline_tests::cutter::Cutter;
use thermocline_tests::group::PressedGroup;
use thermocline_tests::owner::destination_only;
use thermocline_tests::random::Random;
use thermocline_tests::residency::{GuestMemory, must_be_near};
use thermocline_tests::starved::StarvedGroup;
use thermocline_tests::swap::undisturbed;
use thermocline_tests::trials::{give_more_time, unless_the_emulator_fails};
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};
use workload_guest::command::Command;

use crate::cold::{COLD, boot_cold};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Zram], lazy_leaves_what_is_cold_asleep);
    trial!(trials, [Kvm, Root, Zram], lazy_there_and_back);
    trial!(trials, [Kvm, Root, Zram], lazy_under_pressure_with_cuts);
    trial!(trials, [Kvm, Root, Zram], lazy_where_memory_runs_out_with_cuts);
    trial!(trials, [Kvm, Root, Zram], a_guest_that_needs_everything_gets_it);
    trial!(trials, [Kvm, Root, Zram], a_tail_survives_cuts);
    trial!(trials, [Kvm, Root, Zram], either_side_reconnects);
    trial!(trials, [Kvm, Root, Zram], a_lost_source_stops_the_guest);
    trial!(trials, [Kvm, Root, Zram], nobody_ends_a_source_by_mistake);
    trial!(trials, [Kvm, Root, Zram], a_guest_that_ends_frees_its_source);
    trial!(trials, [Kvm, Root, Network], now_moves_a_guest_that_does_not_converge);
}

/// Everything that goes, as quickly as it goes.
const QUICK: [&str; 4] = ["--cold", "lazy", "--cold-rate", "0"];
/// So slowly that post-copy lasts.
const SLOW: [&str; 4] = ["--cold", "lazy", "--cold-rate", "1MiB"];

fn lazy_leaves_what_is_cold_asleep() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let (source, memory, before) = boot_cold(&sandbox)?;
        let mut destination = sandbox.receive(&COLD)?;
        let migration = source.migrate(&destination.address, &How::with(&[&QUICK[..], &["--stay"]].concat()))?;
        let migrated = migration.succeeds()?;
        let report = &migrated.report;
        let post_copy = report.post_copy.context("no post-copy")?;
        // The counter is the host's: what the trials' own processes swap meanwhile is little.
        ensure!(report.swap_ins_before_switchover * 50 <= before.swapped, "{report:?}");
        must_be_near("pages sent by post-copy", post_copy.pages, before.swapped, 2)?;
        must_be_near("given back", post_copy.given_back, post_copy.pages * 4096, 0)?;
        let left = memory.counts()?;
        ensure!(left.swapped == 0, "cold pages are still at the source: {left:?}");
        let there = GuestMemory::of(&destination.machine)?.counts()?;
        let faults = post_copy.faults.context("no word of faults")?;
        must_be_near("destination resident", there.resident, before.resident + faults.count, 3)?;
        must_be_near("destination swapped", there.swapped, before.swapped, 3)?;
        ensure!(there.hole >= before.hole, "holes became pages: {before:?} {there:?}");
        // What is left there is no guest any more.
        let (refused, _) = source.ctl(&["resume", "--force"])?;
        ensure!(refused.sentence(1)?.contains("given back"), "{refused:?}");
        source.ctl(&["quit"])?;
        destination_only(&source, &mut destination.machine)
    })
}

fn lazy_there_and_back() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let (mut here, _, before) = boot_cold(&sandbox)?;
        for time in 0..4 {
            let destination = sandbox.receive(&COLD)?;
            here.migrate(&destination.address, &How::with(&QUICK))?.succeeds()?;
            ensure!(here.process.wait()?.code() == Some(0), "the source failed");
            here = destination.machine;
            let now = GuestMemory::of(&here)?.counts()?;
            must_be_near(&format!("swapped after {time}"), now.swapped, before.swapped, 4)?;
            here.console.must_run()?;
        }
        here.must_go_on()
    })
}

/// How often a guest moves in the trial that hurts most; more often by hand.
const TIMES: &str = "THERMOCLINE_TESTS_LAZY_TIMES";

/// The kernel takes memory from both sides all the time, the connections are cut at random moments, and after each move the
/// guest looks at all of its memory.
fn lazy_under_pressure_with_cuts() -> Result<()> {
    let times: u32 = std::env::var(TIMES).ok().map_or(Ok(3), |times| times.parse())?;
    let sandbox = Sandbox::new()?;
    let groups = [PressedGroup::new()?, PressedGroup::new()?];
    let prefixes: Vec<_> = groups.iter().map(PressedGroup::prefix).collect();
    let prefix = |number: usize| prefixes[number % 2].each_ref().map(String::as_str);
    let mut here = sandbox.boot_behind(&prefix(0), &COLD)?;
    let ready = here.console.ready()?;
    let mut random = Random::new(0x1a2);
    let mut cuts = 0;
    for time in 0..times {
        give_more_time();
        here.page_out_cold(&ready)?;
        let destination = sandbox.receive_behind(&prefix(time as usize + 1), "tcp:127.0.0.1:0", &[], &COLD)?;
        let cutter = Cutter::new(&destination.address)?;
        let migration = here.migrate(cutter.address(), &How::with(&["--cold", "lazy", "--cold-rate", "256MiB"]))?;
        migration.wait_for_phase(Phase::PostCopy)?;
        for _ in 0..random.below(4) {
            std::thread::sleep(Duration::from_millis(random.below(150)));
            cutter.cut();
        }
        let mut there = destination.machine;
        there.must_go_on().with_context(|| format!("move {time}"))?;
        let report = migration.succeeds()?.report;
        cuts += report.post_copy.context("no post-copy")?.cuts;
        destination_only(&here, &mut there).with_context(|| format!("move {time}"))?;
        here = there;
    }
    println!("{times} moves, {cuts} connections cut and made anew, 0 errors");
    Ok(())
}

/// The kernel refuses the destination memory now and then while pages land, and the connections are cut: nothing is lost, and
/// nobody waits for ever.
fn lazy_where_memory_runs_out_with_cuts() -> Result<()> {
    if !StarvedGroup::is_possible()? {
        eprintln!("not run: the control groups of this host are of version 2, which refuse no memory");
        return Ok(());
    }
    let times: u32 = std::env::var(TIMES).ok().map_or(Ok(3), |times| times.parse())?;
    let sandbox = Sandbox::new()?;
    let groups = [StarvedGroup::new()?, StarvedGroup::new()?];
    let prefixes: Vec<_> = groups.iter().map(StarvedGroup::prefix).collect();
    let prefix = |number: usize| prefixes[number % 2].each_ref().map(String::as_str);
    let mut here = sandbox.boot_behind(&prefix(0), &COLD)?;
    let ready = here.console.ready()?;
    let mut random = Random::new(0x57a2);
    let (mut cuts, mut refused, mut held) = (0, [0; 2], 0);
    for time in 0..times {
        give_more_time();
        here.page_out_cold(&ready)?;
        let group = (time as usize + 1) % 2;
        let destination = sandbox.receive_behind(&prefix(group), "tcp:127.0.0.1:0", &[], &COLD)?;
        let cutter = Cutter::new(&destination.address)?;
        let migration = here.migrate(cutter.address(), &How::with(&["--cold", "lazy", "--cold-rate", "64MiB"]))?;
        migration.wait_for_phase(Phase::PostCopy)?;
        for _ in 0..3 {
            refused[group] = groups[group].starve(Duration::from_millis(20 + random.below(100)))?;
            if random.below(2) == 0 {
                cutter.cut();
            }
        }
        let mut there = destination.machine;
        there.must_go_on().with_context(|| format!("move {time}"))?;
        let report = migration.succeeds()?.report;
        cuts += report.post_copy.context("no post-copy")?.cuts;
        held += there
            .process
            .stderr
            .lines()
            .iter()
            .filter(|line| line.contains("is tried again") || line.contains("are tried again"))
            .count();
        destination_only(&here, &mut there).with_context(|| format!("move {time}"))?;
        here = there;
    }
    let refused = refused.iter().sum::<u64>();
    println!(
        "{times} moves, memory refused {refused} times, {held} complaints, {cuts} connections cut and made anew, 0 errors"
    );
    ensure!(refused > 0, "the kernel has refused no memory: this trial proves nothing");
    Ok(())
}

fn a_guest_that_needs_everything_gets_it() -> Result<()> {
    unless_the_emulator_fails(|| {
        let sandbox = Sandbox::new()?;
        let (source, ..) = boot_cold(&sandbox)?;
        let mut destination = sandbox.receive(&COLD)?;
        let migration = source.migrate(&destination.address, &How::with(&SLOW))?;
        migration.wait_for_phase(Phase::PostCopy)?;
        // It looks at all of its memory, far quicker than it would come.
        destination.machine.must_go_on()?;
        let report = migration.succeeds()?.report;
        let faults = report.post_copy.and_then(|post_copy| post_copy.faults).context("no word of faults")?;
        ensure!(faults.count > 500 && faults.p50_us <= faults.p99_us && faults.p99_us <= faults.max_us, "{faults:?}");
        ensure!(source.process.wait()?.code() == Some(0), "the source failed");
        Ok(())
    })
}

fn a_tail_survives_cuts() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (source, ..) = boot_cold(&sandbox)?;
    let mut destination = sandbox.receive_on("tcp:127.0.0.1:0", &[], &COLD)?;
    let cutter = Cutter::new(&destination.address)?;
    let migration = source.migrate(cutter.address(), &How::with(&["--cold", "lazy", "--cold-rate", "48MiB"]))?;
    migration.wait_for_phase(Phase::PostCopy)?;
    for n in 0..5_u64 {
        std::thread::sleep(Duration::from_millis(100 + n * 37));
        cutter.cut();
    }
    destination.machine.must_go_on()?;
    let report = migration.succeeds()?.report;
    let post_copy = report.post_copy.context("no post-copy")?;
    ensure!(post_copy.cuts >= 2, "{post_copy:?}");
    must_be_near("given back", post_copy.given_back, post_copy.pages * 4096, 0)?;
    destination_only(&source, &mut destination.machine)
}

fn either_side_reconnects() -> Result<()> {
    for from_source in [true, false] {
        let sandbox = Sandbox::new()?;
        let (source, ..) = boot_cold(&sandbox)?;
        let mut destination = sandbox.receive_on("tcp:127.0.0.1:0", &[], &COLD)?;
        let cutter = Cutter::new(&destination.address)?;
        let migration = source.migrate(cutter.address(), &How::with(&SLOW))?;
        migration.wait_for_phase(Phase::PostCopy)?;
        cutter.close();
        migration.wait_for_phase(Phase::PostCopyPaused)?;
        let status = source.status()?;
        let post_copy_source = status.post_copy_source.context("the source does not say what is left")?;
        ensure!(
            status.state == RunState::PostCopy && post_copy_source.left > 0 && !post_copy_source.connected,
            "{post_copy_source:?}"
        );
        let post_copy =
            destination.machine.status()?.post_copy.context("the destination does not say what is missing")?;
        ensure!(
            post_copy.missing > 0 && !post_copy.source_lost && !post_copy.first_missing.is_empty(),
            "{post_copy:?}"
        );
        destination.machine.console.must_run()?;
        if from_source {
            let (ended, _) = source.ctl(&["reconnect", "--to", &destination.address])?;
            ensure!(ended.code() == Some(0), "{ended:?}");
        } else {
            let address = format!("unix:{}", sandbox.path("again.sock").display());
            let (ended, _) = source.ctl(&["reconnect", "--listen", &address])?;
            ensure!(ended.code() == Some(0), "{ended:?}");
            let (ended, _) = destination.machine.ctl(&["reconnect", "--to", &address])?;
            ensure!(ended.code() == Some(0), "{ended:?}");
        }
        destination.machine.must_go_on()?;
        migration.succeeds()?;
        destination_only(&source, &mut destination.machine)?;
    }
    Ok(())
}

fn a_lost_source_stops_the_guest() -> Result<()> {
    // Once with a vCPU that waits for a page in the kernel, and has to be stopped there.
    for waits in [false, true] {
        lose_a_source(waits).with_context(|| format!("the guest waits for a page: {waits}"))?;
    }
    Ok(())
}

fn lose_a_source(waits: bool) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (source, ..) = boot_cold(&sandbox)?;
    let mut destination = sandbox.receive_on("tcp:127.0.0.1:0", &["--source-lost-after", "3"], &COLD)?;
    let migration = source.migrate(&destination.address, &How::with(&SLOW))?;
    migration.wait_for_phase(Phase::PostCopy)?;
    source.process.kill();
    if waits {
        destination.machine.console.tell(Command::Check)?;
        eventually("the guest waits", || {
            Ok(destination.machine.status()?.post_copy.is_some_and(|post_copy| post_copy.waited_for > 0))
        })?;
    }
    let machine = &destination.machine;
    eventually("the guest is stopped", || Ok(machine.status()?.state == RunState::Paused))?;
    machine.console.must_be_paused()?;
    let post_copy = machine.status()?.post_copy.context("it does not say what is missing")?;
    ensure!(post_copy.source_lost && post_copy.missing > 0 && !post_copy.first_missing.is_empty(), "{post_copy:?}");
    let said = machine.process.stderr.lines().join("\n");
    ensure!(said.contains("the guest is paused") && said.contains("pages are missing"), "{said:?}");
    let kept = sandbox.path("kept.img");
    let path = kept.to_string_lossy();
    let (ended, lines) = machine.ctl(&["dump", "--to", &path])?;
    ensure!(ended.code() == Some(0), "{ended:?}");
    let report: DumpReport = serde_json::from_str(&lines.join(""))?;
    ensure!(report.missing == post_copy.missing && report.pages > 0, "{report:?}, missing {}", post_copy.missing);
    ensure!(std::fs::metadata(&kept)?.len() == COLD.memory << 20, "the image has another size than guest RAM");
    let beside: serde_json::Value = serde_json::from_slice(&std::fs::read(format!("{path}.json"))?)?;
    let parts = beside["state"]["parts"].as_array().context("no state")?;
    let vcpu = parts.iter().find(|part| part["id"] == "vcpu0").context("no vCPU")?;
    ensure!(vcpu["state"]["regs"]["rip"].as_u64().is_some(), "{vcpu}");
    let (again, _) = machine.ctl(&["dump", "--to", &path])?;
    again.sentence(1).context("over what is there")?;
    let (ended, _) = machine.ctl(&["quit"])?;
    ensure!(ended.code() == Some(0), "{ended:?}");
    Ok(())
}

fn nobody_ends_a_source_by_mistake() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (source, ..) = boot_cold(&sandbox)?;
    let mut destination = sandbox.receive(&COLD)?;
    let migration = source.migrate(&destination.address, &How::with(&SLOW))?;
    migration.wait_for_phase(Phase::PostCopy)?;
    let path = sandbox.path("kept.img").to_string_lossy().into_owned();
    let (refused, _) = destination.machine.ctl(&["dump", "--to", &path])?;
    ensure!(refused.sentence(1)?.contains("pause"), "{refused:?}");
    // To a third host it would be a guest of zeros.
    let onward = destination.machine.migrate("tcp:127.0.0.1:1", &How::usual())?.fails(1)?;
    ensure!(onward.contains("still to come"), "{onward:?}");
    for request in ["quit", "cancel-migration"] {
        let (refused, _) = source.ctl(&[request])?;
        let sentence = refused.sentence(1)?;
        ensure!(sentence.contains("pages") && sentence.contains("only here"), "{sentence:?}");
    }
    source.process.signal(Signal::TERM)?;
    eventually("it says why not", || Ok(source.process.stderr.lines().join(" ").contains("interrupt again")))?;
    destination.machine.must_go_on()?;
    migration.succeeds()?;
    ensure!(source.process.wait()?.code() == Some(0), "the source failed");
    Ok(())
}

fn a_guest_that_ends_frees_its_source() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (source, ..) = boot_cold(&sandbox)?;
    let destination = sandbox.receive(&COLD)?;
    let migration = source.migrate(&destination.address, &How::with(&SLOW))?;
    migration.wait_for_phase(Phase::PostCopy)?;
    let (ended, _) = destination.machine.ctl(&["quit"])?;
    ensure!(ended.code() == Some(0), "{ended:?}");
    migration.succeeds()?;
    ensure!(source.process.wait()?.code() == Some(0), "the source failed");
    Ok(())
}

fn now_moves_a_guest_that_does_not_converge() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let network = Network::with_rate(400)?;
    let workload = Workload { working_set: 40, cold: 0, rate: 0, writes: 100, ..Workload::default() };
    let source = sandbox.boot_behind(&network.prefix(0), &workload)?;
    let mut destination = sandbox.receive_behind(&network.prefix(1), &format!("tcp:{SECOND}:0"), &[], &workload)?;
    let how = How::with(&["--switchover", "now", "--cold-rate", "0"]);
    let report = source.migrate(&destination.address, &how)?.succeeds()?.report;
    ensure!(report.rounds == 1 && report.post_copy.is_some_and(|post_copy| post_copy.pages > 0), "{report:?}");
    destination_only(&source, &mut destination.machine)
}
