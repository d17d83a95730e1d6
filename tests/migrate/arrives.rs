//! The guest arrives, whole, whatever it does meanwhile and whichever way it goes.

use anyhow::{Context, Result, ensure};
use thermocline::control::RunState;
use thermocline_tests::console::must_continue;
use thermocline_tests::owner::destination_only;
use thermocline_tests::process::TIMEOUT;
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], over_tcp);
    trial!(trials, [Kvm], over_a_unix_socket);
    trial!(trials, [Kvm], eagerly);
    trial!(trials, [Kvm], as_what_hosts_have_in_common);
    trial!(trials, [Kvm], with_two_vcpus);
    trial!(trials, [Kvm], with_memory_on_both_sides_of_the_gap);
    trial!(trials, [Kvm], while_it_writes_as_fast_as_it_can);
    trial!(trials, [Kvm], there_and_back_again);
    trial!(trials, [Kvm], people_see_lines_and_a_table);
    trial!(trials, [Kvm], the_network_name_of_a_host_is_enough);
}

/// One migration of one guest.
fn migrates(workload: Workload, listen: &str, how: &How) -> Result<()> {
    migrates_with(&[], workload, listen, how)
}

/// As [`migrates`], with more options of `run`.
fn migrates_with(more: &[&str], workload: Workload, listen: &str, how: &How) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot_with(more, &workload)?;
    let listen = listen.replace("PATH", &sandbox.path("migration.sock").to_string_lossy());
    let destination = sandbox.receive_on(&listen, &[], &workload)?;
    let mut there = destination.machine;
    source.console.must_run()?;
    let migrated = source.migrate(&destination.address, how)?.succeeds()?;
    destination_only(&source, &mut there)?;
    let said = &source.process.stderr.lines();
    ensure!(said.len() == 1 && said[0].contains("runs at the destination"), "the source said {said:?}");
    ensure!(migrated.report.destination.is_some(), "the destination's residency is not told");
    let status = there.status()?;
    ensure!(status.cpus == workload.cpus && status.memory.bytes() == workload.memory << 20, "{status:?}");
    // It can be controlled where it is now.
    ensure!(there.ctl(&["pause"])?.0.code() == Some(0), "pause failed");
    there.console.must_be_paused()?;
    ensure!(there.ctl(&["resume"])?.0.code() == Some(0), "resume failed");
    there.console.type_line("off")?;
    ensure!(there.process.wait()?.code() == Some(0), "the guest did not power off");
    ensure!(!there.api.exists(), "the API socket is still there");
    Ok(())
}

fn over_tcp() -> Result<()> {
    migrates(Workload::default(), "tcp:127.0.0.1:0", &How::usual())
}

fn over_a_unix_socket() -> Result<()> {
    migrates(Workload::default(), "unix:PATH", &How::usual())
}

fn eagerly() -> Result<()> {
    migrates(Workload::default(), "tcp:127.0.0.1:0", &How::with(&["--cold", "eager"]))
}

fn as_what_hosts_have_in_common() -> Result<()> {
    migrates_with(&["--cpu", "x86-64-v1"], Workload::default(), "tcp:127.0.0.1:0", &How::usual())
}

fn with_two_vcpus() -> Result<()> {
    for cold in ["paced", "eager"] {
        let workload = Workload { cpus: 2, rate: 4000, ..Workload::default() };
        migrates(workload, "tcp:127.0.0.1:0", &How::with(&["--cold", cold])).context(cold)?;
    }
    Ok(())
}

fn with_memory_on_both_sides_of_the_gap() -> Result<()> {
    migrates(Workload { memory: 4 << 10, ..Workload::default() }, "tcp:127.0.0.1:0", &How::usual())
}

fn while_it_writes_as_fast_as_it_can() -> Result<()> {
    let workload = Workload { working_set: 24, rate: 0, writes: 100, ..Workload::default() };
    migrates(workload, "tcp:127.0.0.1:0", &How::with(&["--downtime-limit", "2000"]))
}

fn there_and_back_again() -> Result<()> {
    const TIMES: usize = 6;
    let sandbox = Sandbox::new()?;
    let workload = Workload { rate: 5000, ..Workload::default() };
    let mut here = sandbox.boot(&workload)?;
    for time in 0..TIMES {
        let destination = sandbox.receive(&workload)?;
        here.migrate(&destination.address, &How::usual())?.succeeds().with_context(|| format!("time {time}"))?;
        let mut there = destination.machine;
        destination_only(&here, &mut there).with_context(|| format!("time {time}"))?;
        here = there;
    }
    Ok(())
}

/// Without `--json`, and not in a terminal.
fn people_see_lines_and_a_table() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&Workload::default())?;
    let mut destination = sandbox.receive(&Workload::default())?;
    let api = source.api.to_string_lossy().into_owned();
    let migrate = sandbox.start("migrate", &["migrate", "--api-socket", &api, "--to", &destination.address])?;
    let ended = migrate.wait_within(TIMEOUT)?;
    ensure!(ended.code() == Some(0), "{ended:?}");
    let table = migrate.stdout.lines().join("\n");
    for part in ["--cold paced", "downtime", "bytes sent", "destination swapped"] {
        ensure!(table.contains(part), "the table has no {part:?}: {table}");
    }
    ensure!(ended.stderr.iter().any(|line| line.contains("resident pages")), "no progress: {:?}", ended.stderr);
    ensure!(!ended.stderr.concat().contains('\x1b'), "colours without a terminal: {:?}", ended.stderr);
    destination_only(&source, &mut destination.machine)
}

fn the_network_name_of_a_host_is_enough() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&Workload::default())?;
    let destination = sandbox.receive(&Workload::default())?;
    let by_name = destination.address.replace("127.0.0.1", "localhost");
    source.migrate(&by_name, &How::usual())?.succeeds()?;
    ensure!(destination.machine.status()?.state == RunState::Running, "{:?}", destination.machine.status()?);
    source.process.wait()?;
    destination.machine.console.must_run()?;
    must_continue(source.console.output(), destination.machine.console.output())
}
