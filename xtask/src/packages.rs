//! Debian packages that tests and benchmarks need: only what is missing is installed.

use anyhow::{Result, bail};

use crate::host;
use crate::step::{program, run};

/// Programs, and the package that has each on Debian and its relatives.
const NEEDED: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("mkswap", "util-linux"),
    ("swapon", "mount"),
];

/// Packages of the programs that are not `there`, each once.
fn missing(there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<_> = NEEDED.iter().filter(|(program, _)| !there(program)).map(|(_, p)| *p).collect();
    packages.dedup();
    packages
}

/// Installs what is missing if this is root and apt is there; otherwise names it in a sentence and goes on.
///
/// # Errors
/// When installing fails, or in CI where it cannot be done.
pub(crate) fn ensure_installed() -> Result<()> {
    let packages = missing(|name| host::find_program(name).is_some());
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !host::is_root() || host::find_program("apt-get").is_none() {
        let text =
            format!("some tests need the Debian packages {list}: install them with `apt-get install {list}` as root");
        if host::is_ci() {
            bail!(text);
        }
        eprintln!("{text}; without, these tests say that they are skipped.");
        return Ok(());
    }
    let apt = || {
        let mut apt = program("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet=2");
        apt
    };
    // Lists that are there may do when they cannot be renewed; the installation tells.
    if let Err(e) = run(apt().arg("update")) {
        eprintln!("{e:#}; going on with the package lists that are there");
    }
    run(apt().args(["install", "--yes", "--no-install-recommends"]).args(&packages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_package_is_named_once_and_only_if_missing() {
        assert_eq!(missing(|name| name == "swapon"), ["qemu-system-x86", "iproute2", "util-linux"]);
        assert!(missing(|_| true).is_empty());
    }
}
