//! Where a downtime goes is told: step by step, device by device, by both sides.

use anyhow::{Context, Result, ensure};
use thermocline::migration::downtime::{Side, SideStep};
use thermocline::stopwatch::Work;
use thermocline_tests::owner::destination_only;
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], a_downtime_is_told_by_its_steps);
}

fn a_downtime_is_told_by_its_steps() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let guest = Workload::default();
    let source = sandbox.boot(&guest)?;
    let destination = sandbox.receive(&guest)?;
    let migrated = source.migrate(&destination.address, &How::usual())?.succeeds()?;
    let mut there = destination.machine;
    destination_only(&source, &mut there)?;
    let downtime = migrated.report.downtime;
    let took = |side, work, part: &str| {
        let of =
            |SideStep { side: of, step }: &&SideStep| *of == side && step.work == work && step.part.as_str() == part;
        let step = downtime.steps.iter().find(of).with_context(|| format!("no step {side:?} {work:?} {part}"));
        step.map(|step| step.step.us)
    };
    for part in ["vcpus", "serial0", "rng0"] {
        took(Side::Source, Work::Stop, part)?;
        took(Side::Destination, Work::Restore, part)?;
        took(Side::Destination, Work::Resume, part)?;
    }
    took(Side::Source, Work::LastRound, "ram")?;
    took(Side::Between, Work::Transfer, "network")?;
    took(Side::Destination, Work::Land, "ram")?;
    // Reading a vCPU's state and writing it takes dozens of calls.
    ensure!(took(Side::Source, Work::Save, "state")? > 0, "{downtime:?}");
    ensure!(took(Side::Destination, Work::Restore, "vcpus")? > 0, "{downtime:?}");

    // And for people.
    let destination = sandbox.receive(&guest)?;
    let api = there.api.display().to_string();
    let client = sandbox.start("migrate", &["migrate", "--api-socket", &api, "--to", &destination.address])?;
    ensure!(client.wait()?.code() == Some(0), "{:?}", client.stderr.lines());
    let table = client.stdout.lines();
    for words in [["source", "send the last pages", "ram"], ["destination", "restore", "vcpus"]] {
        ensure!(
            table.iter().any(|line| words.iter().all(|word| line.contains(word))),
            "no line with {words:?}: {table:?}"
        );
    }
    let mut there_again = destination.machine;
    destination_only(&there, &mut there_again)
}
