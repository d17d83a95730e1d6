//! What may be left out on this host.

use std::path::Path;

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
