//! How a machine ends, and the code that tells it.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use thermocline::control::{Request, RunState};
use thermocline_tests::process::TIMEOUT;
use thermocline_tests::{Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], a_guest_that_powers_off_is_a_success);
    trial!(trials, [Kvm], a_guest_that_resets_is_a_success_where_it_ends);
    trial!(trials, [Kvm], a_guest_that_resets_starts_anew);
    trial!(trials, [Kvm], a_triple_fault_is_told_apart);
    trial!(trials, [Kvm], sigint_and_sigterm_end_it_and_clean_up);
    trial!(trials, [Kvm], quit_is_a_success);
    trial!(trials, [Kvm], a_receiver_that_is_interrupted_cleans_up);
}

/// Types a command that ends the guest; how the monitor ended.
fn ends_after(command: &str, options: &[&str]) -> Result<thermocline_tests::process::Ended> {
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot_with(options, &Workload::default())?;
    machine.console.type_line(command)?;
    let ended = machine.process.wait()?;
    ensure!(!machine.api.exists(), "the API socket is still there");
    Ok(ended)
}

fn a_guest_that_powers_off_is_a_success() -> Result<()> {
    let ended = ends_after("off", &[])?;
    ensure!(ended.code() == Some(0) && ended.stderr.is_empty(), "{ended:?}");
    Ok(())
}

fn a_guest_that_resets_is_a_success_where_it_ends() -> Result<()> {
    let ended = ends_after("reset", &["--no-reboot"])?;
    ensure!(ended.code() == Some(0) && ended.stderr.is_empty(), "{ended:?}");
    Ok(())
}

/// Three lives of one machine with two vCPUs, in one process; each finds memory as it is after power-on.
fn a_guest_that_resets_starts_anew() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot(&Workload { cpus: 2, ..Workload::default() })?;
    for _ in 0..2 {
        machine.console.reset()?;
        machine.must_go_on()?;
        ensure!(machine.status()?.state == RunState::Running, "it does not run");
    }
    machine.console.type_line("off")?;
    let ended = machine.process.wait()?;
    ensure!(ended.code() == Some(0) && ended.stderr.is_empty(), "{ended:?}");
    Ok(())
}

fn a_triple_fault_is_told_apart() -> Result<()> {
    let ended = ends_after("crash", &[])?;
    ensure!(ended.sentence(4)?.contains("triple fault"), "{ended:?}");
    Ok(())
}

fn sigint_and_sigterm_end_it_and_clean_up() -> Result<()> {
    for signal in [Signal::INT, Signal::TERM] {
        let sandbox = Sandbox::new()?;
        let machine = sandbox.boot(&Workload::default())?;
        ensure!(machine.api.exists() && machine.status()?.state == RunState::Running, "no API socket");
        machine.process.signal(signal)?;
        let ended = machine.process.wait()?;
        ended.sentence(130)?;
        ensure!(!machine.api.exists(), "the API socket is still there after {signal:?}");
    }
    Ok(())
}

fn quit_is_a_success() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let machine = sandbox.boot(&Workload::default())?;
    machine.ask(&Request::Quit { force: false })?;
    let ended = machine.process.wait_within(TIMEOUT)?;
    ensure!(ended.code() == Some(0) && ended.stderr.is_empty(), "{ended:?}");
    ensure!(!machine.api.exists(), "the API socket is still there");
    Ok(())
}

fn a_receiver_that_is_interrupted_cleans_up() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let socket = sandbox.path("migration.sock");
    let listen = format!("unix:{}", socket.display());
    let waiting = sandbox.receive_on(&listen, &[], &Workload::default())?.machine;
    ensure!(socket.exists() && waiting.status()?.state == RunState::Waiting, "it does not wait");
    waiting.process.signal(Signal::INT)?;
    waiting.process.wait()?.sentence(130)?;
    ensure!(!socket.exists() && !waiting.api.exists(), "a socket is still there");
    waiting.console.must_be_silent()
}
