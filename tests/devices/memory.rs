//! Randomness comes.

use anyhow::{Result, ensure};
use thermocline_tests::{Sandbox, Trials, trial};
use workload_guest::Line;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], randomness_comes);
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
