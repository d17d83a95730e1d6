//! What may be done to this host, and what may be left out on it.

use std::path::Path;

/// Set, tests may set up on this host what they need: swap devices, network namespaces, control groups, loop devices.
pub const USE_HOST: &str = "THERMOCLINE_TESTS_USE_HOST";

/// Whether tests may set up on this host what they need; if not, a sentence says how to let them.
///
/// # Errors
/// When nobody has said that they may.
pub fn may_be_used() -> Result<(), String> {
    let allowed = std::env::var_os(USE_HOST).is_some_and(|value| !value.is_empty() && value != "0");
    allowed.then_some(()).ok_or_else(|| {
        format!("it sets up things of its own on this host, which only {USE_HOST}=1 or `cargo xtask test` allows")
    })
}

/// Whether this is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether a test that needs nothing but root has to run: in CI, where nothing may be left out that the machine could do.
pub fn must_run() -> bool {
    std::env::var("CI").is_ok_and(|ci| ci == "true") && is_root()
}

/// The same of a test that needs a virtual machine too.
pub fn must_run_with_kvm() -> bool {
    must_run() && Path::new("/dev/kvm").exists()
}

/// Says in a line that a test is skipped, and why. Panics where it [must run](must_run).
pub fn skip(test: &str, why: impl std::fmt::Display) {
    assert!(!must_run(), "{test} may not be skipped with CI=true on this machine: {why}");
    eprintln!("skipped {test}: {why}");
}
