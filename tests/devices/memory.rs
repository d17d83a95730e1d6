//! Randomness comes; what is free, or in the balloon, becomes holes.

use anyhow::{Result, ensure};
use thermocline_tests::{Machine, Sandbox, Trials, trial};
use workload_guest::Line;

use crate::answers::free;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], randomness_comes);
    trial!(trials, [Kvm], reported_pages_become_holes_and_come_back_as_zeros);
    trial!(trials, [Kvm], a_balloon_takes_pages_and_gives_them_back);
}

fn randomness_comes() -> Result<()> {
    const BYTES: u64 = 100_000;
    let sandbox = Sandbox::new()?;
    for guest in ["random=on", "random=on,interrupts=on"] {
        let mut machine = sandbox.boot_devices(&[], guest, &[])?;
        let random = machine.console.device(&format!("random {BYTES}"), |line| {
            if let Line::Random(random) = line { Some(random) } else { None }
        })?;
        let half = BYTES * 4;
        // Twenty standard deviations.
        ensure!(random.bytes == BYTES && random.ones.abs_diff(half) < 9000, "{random:?}");
    }
    Ok(())
}

const FREE: u64 = 4096;

fn boot(sandbox: &Sandbox) -> Result<Machine> {
    sandbox.boot_devices(&[], "free=16MiB", &["--balloon", "on"])
}

fn holes(machine: &Machine) -> Result<u64> {
    Ok(machine.pages()?.counts.hole)
}

fn reported_pages_become_holes_and_come_back_as_zeros() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut machine = boot(&sandbox)?;
    let filled = machine.console.device("free-fill", free)?;
    ensure!(filled.pages == FREE, "{filled:?}");
    let before = holes(&machine)?;
    let reported = machine.console.device("free-report", free)?;
    ensure!(reported.pages == FREE, "{reported:?}");
    let after = holes(&machine)?;
    ensure!(after >= before + FREE, "{before} holes became {after}, with {FREE} pages reported");
    let checked = machine.console.device("free-check", free)?;
    ensure!(checked.zeros == FREE && checked.errors == 0, "{checked:?}");
    machine.console.device("free-fill", free)?;
    let checked = machine.console.device("free-check", free)?;
    ensure!(checked.kept == FREE, "{checked:?}");
    machine.console.must_run().map(drop)
}

fn a_balloon_takes_pages_and_gives_them_back() -> Result<()> {
    const INSIDE: u64 = 3000;
    let sandbox = Sandbox::new()?;
    let mut machine = boot(&sandbox)?;
    machine.console.device("free-fill", free)?;
    let before = holes(&machine)?;
    let set = |machine: &mut Machine, pages| {
        machine.console.device(&format!("balloon {pages}"), |line| {
            if let Line::Balloon(balloon) = line { Some(balloon.pages) } else { None }
        })
    };
    ensure!(set(&mut machine, INSIDE)? == INSIDE, "it did not inflate");
    let inside = holes(&machine)?;
    ensure!(inside >= before + INSIDE, "{before} holes became {inside}, with {INSIDE} pages in the balloon");
    ensure!(set(&mut machine, 0)? == 0, "it did not deflate");
    let checked = machine.console.device("free-check", free)?;
    ensure!(checked.zeros == INSIDE && checked.kept == FREE - INSIDE, "{checked:?}");
    Ok(())
}
