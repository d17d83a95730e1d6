//! A migration has a life of its own: it goes on without whoever started it, anybody can watch it, and what came of it can
//! be asked for afterwards.

use anyhow::{Context, Result, ensure};
use thermocline::control::{Answer, MigrationFailure, MigrationState, MigrationStatus, Request, RunState};
use thermocline::migration::progress::{Phase, Report};
use thermocline_tests::owner::destination_only;
use thermocline_tests::proxy::Proxy;
use thermocline_tests::{How, Machine, Sandbox, Trials, Workload, trial};

/// Bytes a second at which a migration takes some seconds.
const SLOW: u64 = 24 << 20;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], it_goes_on_without_whoever_started_it);
    trial!(trials, [Kvm], what_came_of_it_can_be_asked_for);
    trial!(trials, [Kvm], one_that_is_detached_is_waited_for_by_others);
}

fn status(machine: &Machine) -> Result<MigrationStatus> {
    match machine.ask(&Request::Migration {})? {
        Answer::Migration(status) => Ok(*status),
        other => anyhow::bail!("{other:?} in place of a migration"),
    }
}

fn it_goes_on_without_whoever_started_it() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&Workload::default())?;
    let mut destination = sandbox.receive(&Workload::default())?;
    let slow = Proxy::with_rate(&destination.address, SLOW)?;
    let migration = source.migrate(&slow.address, &How::usual())?;
    migration.wait_for_phase(Phase::Hot)?;
    migration.process.kill();
    migration.end()?;
    let api = source.api.to_string_lossy().into_owned();
    let wait = || sandbox.start("wait", &["ctl", "--api-socket", &api, "wait-migration"]);
    let watchers = [wait()?, wait()?, wait()?];
    watchers[2].kill();
    ensure!(source.status()?.state == RunState::Migrating, "{:?}", source.status()?);
    ensure!(status(&source)?.state == MigrationState::Running, "{:?}", status(&source)?);
    for watcher in &watchers[..2] {
        let ended = watcher.wait()?;
        ensure!(ended.code() == Some(0), "{ended:?}");
        let report: Report = serde_json::from_str(&watcher.stdout.lines().join(""))?;
        ensure!(report.bytes_sent > 32 << 20, "{report:?}");
    }
    destination_only(&source, &mut destination.machine)
}

fn what_came_of_it_can_be_asked_for() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let (none, _) = source.ctl(&["migration"])?;
    ensure!(none.sentence(1)?.contains("no such migration"), "{none:?}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    source.migrate(&format!("tcp:{nobody}"), &How::usual())?.fails(10)?;
    let failed = status(&source)?;
    let reason = failed.failure.as_ref().and_then(|failure| failure.reason);
    ensure!(failed.id == 1 && failed.state == MigrationState::Failed, "{failed:?}");
    ensure!(reason == Some(MigrationFailure::Unreachable), "{failed:?}");
    // Whoever waits for one that has ended is told how, with its code.
    let (waited, _) = source.ctl(&["wait-migration", "--id", "1"])?;
    waited.sentence(10)?;
    let (another, _) = source.ctl(&["wait-migration", "--id", "2"])?;
    another.sentence(1)?;
    source.must_go_on()?;
    let destination = sandbox.receive(&Workload::default())?;
    let report = source.migrate(&destination.address, &How::with(&["--stay"]))?.succeeds()?.report;
    let done = status(&source)?;
    ensure!((done.id, done.state) == (2, MigrationState::Done) && done.report == Some(report), "{done:?}");
    Ok(())
}

fn one_that_is_detached_is_waited_for_by_others() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&Workload::default())?;
    let mut destination = sandbox.receive(&Workload::default())?;
    let slow = Proxy::with_rate(&destination.address, SLOW)?;
    let started = source.migrate(&slow.address, &How::with(&["--detach"]))?;
    let ended = started.end()?;
    ensure!(ended.code() == Some(0), "{ended:?}");
    let said: serde_json::Value = serde_json::from_str(&started.process.stdout.lines().join(""))?;
    let id = said["migration"]["id"].as_u64().context("no id")?;
    ensure!(source.status()?.state == RunState::Migrating, "{:?}", source.status()?);
    let (waited, _) = source.ctl(&["wait-migration", "--id", &id.to_string()])?;
    ensure!(waited.code() == Some(0), "{waited:?}");
    destination_only(&source, &mut destination.machine)
}
