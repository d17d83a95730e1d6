//! A guest that drives virtio devices arrives with them: its drivers notice nothing.

use anyhow::{Context, Result, ensure};
use thermocline_tests::owner::destination_only;
use thermocline_tests::{How, Machine, Sandbox, Trials, trial};
use workload_guest::Line;

/// Enough requests for the queue's indices to go round.
const BYTES: u64 = 300_000;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], randomness_with_interrupts);
    trial!(trials, [Kvm], randomness_without_interrupts);
}

fn must_be_random(machine: &mut Machine) -> Result<()> {
    let random = machine
        .console
        .device(&format!("random {BYTES}"), |line| if let Line::Random(random) = line { Some(random) } else { None })?;
    // Twenty standard deviations.
    ensure!(random.bytes == BYTES && random.ones.abs_diff(BYTES * 4) < 16_000, "{random:?}");
    Ok(())
}

fn randomness(interrupts: &str) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot_devices(&[], &format!("random=on,interrupts={interrupts}"), &[])?;
    must_be_random(&mut source).context("at the source")?;
    let destination = sandbox.receive(&source.workload)?;
    let mut there = destination.machine;
    source.migrate(&destination.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut there)?;
    must_be_random(&mut there).context("at the destination")?;
    must_be_random(&mut there).context("at the destination, once more")
}

fn randomness_with_interrupts() -> Result<()> {
    randomness("on")
}

fn randomness_without_interrupts() -> Result<()> {
    randomness("off")
}
