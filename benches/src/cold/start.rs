//! Starting: how soon the guest runs, and what its monitor occupies besides guest RAM.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::stop;
use crate::subject::{GuestSpec, Subject};

/// After this a monitor has done what it does once.
const SETTLED: Duration = Duration::from_millis(500);

pub(super) fn measure(
    subject: &dyn Subject,
    machine: &GuestSpec,
    folder: &Path,
) -> Result<BTreeMap<&'static str, f64>> {
    let host = subject.run(folder, machine)?;
    let (first_byte, ready) = host.console.ready()?;
    // The guest tells how long it had been running when it began to write this line.
    let running = Duration::from_micros(ready.boot_us);
    let to_guest = first_byte.duration_since(host.started).saturating_sub(running);
    stop::sleep(SETTLED)?;
    let overhead = host.process.overhead_kib().context("the monitor has ended")?;
    Ok(BTreeMap::from([("exec_to_guest_ms", to_guest.as_secs_f64() * 1000.0), ("overhead_kib", overhead as f64)]))
}
