//! Migrations that somebody gives up, or that cannot be: the guest goes on where it was.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use thermocline::control::{Request, RunState};
use thermocline::migration::progress::Phase;
use thermocline_tests::console::eventually;
use thermocline_tests::owner::{destination_only, source_only};
use thermocline_tests::peer::{Server, read_to_end};
use thermocline_tests::proxy::Proxy;
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], cancelled_and_then_again);
    trial!(trials, [Kvm], cancelled_before_the_destination_says_anything);
    trial!(trials, [Kvm], interrupted_at_the_client);
    trial!(trials, [Kvm], interrupted_at_the_destination);
    trial!(trials, [Kvm], interrupted_at_the_source);
    trial!(trials, [Kvm], a_second_one_at_the_same_time);
    trial!(trials, [Kvm], commands_meanwhile);
    trial!(trials, [Kvm], a_guest_that_writes_too_fast);
    trial!(trials, [Kvm], a_guest_that_ends_meanwhile);
}

/// So slow that a migration of the usual guest takes seconds.
const SLOW: u64 = 8 << 20;

fn cancelled_and_then_again() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let workload = Workload::default();
    let mut source = sandbox.boot(&workload)?;
    for _ in 0..2 {
        let destination = sandbox.receive(&workload)?;
        let slow = Proxy::with_rate(&destination.address, SLOW)?;
        let migration = source.migrate(&slow.address, &How::usual())?;
        migration.wait_for(|progress| progress.pages.hot > 1000)?;
        ensure!(source.status()?.state == RunState::Migrating, "{:?}", source.status()?);
        let (cancelled, _) = source.ctl(&["cancel-migration"])?;
        ensure!(cancelled.code() == Some(0), "{cancelled:?}");
        ensure!(migration.fails(19)?.contains("cancelled"), "not said");
        drop(slow);
        source_only(&mut source, &destination.machine, 16)?;
        let (nothing, _) = source.ctl(&["cancel-migration"])?;
        nothing.sentence(1)?;
    }
    let mut destination = sandbox.receive(&workload)?;
    source.migrate(&destination.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut destination.machine)
}

/// A destination that has accepted the connection and is silent.
fn cancelled_before_the_destination_says_anything() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let silent = Server::start(|stream| {
        read_to_end(&stream);
        Ok(())
    })?;
    let migration = source.migrate(&silent.address, &How::usual())?;
    eventually("it migrates", || Ok(source.status()?.state == RunState::Migrating))?;
    source.ask(&Request::CancelMigration {})?;
    migration.fails(19)?;
    silent.finish()?;
    source.must_go_on()
}

/// Ctrl-C at `thermocline migrate` cancels it.
fn interrupted_at_the_client() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let destination = sandbox.receive(&Workload::default())?;
    let slow = Proxy::with_rate(&destination.address, SLOW)?;
    let migration = source.migrate(&slow.address, &How::usual())?;
    migration.wait_for_phase(Phase::Hot)?;
    migration.process.signal(Signal::INT)?;
    migration.fails(19)?;
    eventually("the source has its guest back", || Ok(source.status()?.state == RunState::Running))?;
    drop(slow);
    source_only(&mut source, &destination.machine, 16).map(drop)
}

fn interrupted_at_the_destination() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let destination = sandbox.receive(&Workload::default())?;
    let slow = Proxy::with_rate(&destination.address, SLOW)?;
    let migration = source.migrate(&slow.address, &How::usual())?;
    migration.wait_for_phase(Phase::Hot)?;
    destination.machine.process.signal(Signal::INT)?;
    migration.fails(16)?;
    source_only(&mut source, &destination.machine, 130).map(drop)
}

/// The guest ends with its monitor, and the destination does not take half of it for a guest.
fn interrupted_at_the_source() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&Workload::default())?;
    let destination = sandbox.receive(&Workload::default())?;
    let slow = Proxy::with_rate(&destination.address, SLOW)?;
    let migration = source.migrate(&slow.address, &How::usual())?;
    migration.wait_for_phase(Phase::Hot)?;
    source.process.signal(Signal::INT)?;
    source.process.wait()?.sentence(130)?;
    ensure!(migration.end()?.code() != Some(0), "the client takes it for a success");
    destination.machine.process.wait()?.sentence(16)?;
    destination.machine.console.must_be_silent()
}

fn a_second_one_at_the_same_time() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&Workload::default())?;
    let mut destination = sandbox.receive(&Workload::default())?;
    let other = sandbox.receive(&Workload::default())?;
    let slow = Proxy::with_rate(&destination.address, 2 * SLOW)?;
    let first = source.migrate(&slow.address, &How::usual())?;
    first.wait_for_phase(Phase::Hot)?;
    let second = source.migrate(&other.address, &How::usual())?.fails(1)?;
    ensure!(second.contains("under way") && second.contains("cancel-migration"), "{second:?}");
    first.succeeds()?;
    ensure!(!other.machine.process.has_ended()?, "the other destination was called");
    other.machine.console.must_be_silent()?;
    destination_only(&source, &mut destination.machine)
}

fn commands_meanwhile() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&Workload::default())?;
    let mut destination = sandbox.receive(&Workload::default())?;
    let slow = Proxy::with_rate(&destination.address, 2 * SLOW)?;
    let migration = source.migrate(&slow.address, &How::usual())?;
    migration.wait_for_phase(Phase::Hot)?;
    for command in [&["pause"][..], &["resume"], &["resume", "--force"]] {
        let (refused, _) = source.ctl(command)?;
        ensure!(refused.sentence(1)?.contains("under way"), "{command:?}: {refused:?}");
    }
    ensure!(source.pages()?.counts.total() == 64 << 8, "{:?}", source.pages()?);
    source.console.must_run()?;
    ensure!(destination.machine.status()?.state == RunState::Waiting, "{:?}", destination.machine.status()?);
    migration.succeeds()?;
    destination_only(&source, &mut destination.machine)
}

fn a_guest_that_writes_too_fast() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let workload = Workload { working_set: 32, cold: 0, rate: 0, writes: 100, ..Workload::default() };
    let mut source = sandbox.boot(&workload)?;
    let destination = sandbox.receive(&workload)?;
    let slow = Proxy::with_rate(&destination.address, 4 * SLOW)?;
    let how = How::with(&["--max-rounds", "3", "--downtime-limit", "10"]);
    let sentence = source.migrate(&slow.address, &how)?.fails(18)?;
    for part in ["does not converge", "3 rounds", "MiB/s", "--downtime-limit"] {
        ensure!(sentence.contains(part), "{sentence:?} does not say {part:?}");
    }
    drop(slow);
    let there = source_only(&mut source, &destination.machine, 16)?;
    ensure!(there.contains("keeps the guest"), "{there:?}");
    Ok(())
}

/// The guest powers off in the middle: both sides end, and neither takes it for a guest that has moved.
fn a_guest_that_ends_meanwhile() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let destination = sandbox.receive(&Workload::default())?;
    let slow = Proxy::with_rate(&destination.address, SLOW)?;
    let migration = source.migrate(&slow.address, &How::usual())?;
    migration.wait_for_phase(Phase::Hot)?;
    source.console.type_line("off")?;
    let ended = source.process.wait().context("the source")?;
    ensure!(ended.code() == Some(0), "{ended:?}");
    ensure!(migration.end()?.code() != Some(0), "the client takes it for a success");
    drop(slow);
    destination.machine.process.wait().context("the destination")?.sentence(16)?;
    destination.machine.console.must_be_silent()
}
