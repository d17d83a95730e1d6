//! The checks, one file each.

mod busy;
mod cpus;
mod disk;
mod dmesg;
mod memory;
mod network;
mod ping;
mod power;
mod rng;

use std::fmt::Display;
use std::fs;
use std::time::{Duration, Instant};

use crate::Outcome;

/// How long a device may take to appear.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(20);

type Check = fn(&str) -> Outcome;

/// Name, and what it does with its argument, which may be empty.
const CHECKS: &[(&str, Check)] = &[
    ("busy", busy::check),
    ("cpus", cpus::check),
    ("disk", disk::check),
    ("dmesg", dmesg::check),
    ("memory", memory::check),
    ("ping", ping::check),
    ("power-button", power::button),
    ("poweroff", power::off),
    ("reboot", power::reboot),
    ("rng", rng::check),
];

/// Runs the check of this name.
pub(crate) fn run(name: &str, argument: &str) -> Outcome {
    let check = CHECKS.iter().find(|(known, _)| *known == name);
    let (_, check) = check.ok_or_else(|| format!("there is no such check; there are {}", names()))?;
    check(argument)
}

/// All names.
pub(crate) fn names() -> String {
    CHECKS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// What was tried, in front of why it failed.
fn tried<E: Display>(what: impl Display) -> impl FnOnce(E) -> String {
    move |e| format!("{what}: {e}")
}

/// A file's text without the white space around it; a sentence where it cannot be read.
fn text_of(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).map_err(tried(path))
}

/// Waits until `there` gives something.
fn wait_for<T>(what: &str, mut there: impl FnMut() -> Option<T>) -> Result<T, String> {
    let deadline = Instant::now() + DEVICE_TIMEOUT;
    loop {
        if let Some(found) = there() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(format!("no {what} after {} s", DEVICE_TIMEOUT.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
