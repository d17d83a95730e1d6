//! Debian packages that tests and benchmarks need: only what is missing is installed.

use std::path::Path;

use anyhow::{Result, bail};
use command_line::note;

use crate::{apt, host};

/// Programs, and the package that has each on Debian and its relatives.
const NEEDED: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("mkswap", "util-linux"),
    ("swapon", "mount"),
    ("losetup", "mount"),
    ("iasl", "acpica-tools"),
];

/// What the lab needs besides: programs, or files that a package brings.
const NEEDED_FOR_LAB: &[(&str, &str)] = &[
    ("/usr/src/linux-source-6.12.tar.xz", "linux-source-6.12"),
    ("/usr/include/libelf.h", "libelf-dev"),
    ("/usr/include/openssl/ssl.h", "libssl-dev"),
    ("git", "git"),
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("cpio", "cpio"),
    ("xz", "xz-utils"),
    ("depmod", "kmod"),
    ("busybox", "busybox-static"),
];

/// What Linux guests are made with.
const NEEDED_FOR_GUESTS: &[(&str, &str)] =
    &[("busybox", "busybox-static"), ("cpio", "cpio"), ("depmod", "kmod"), ("mke2fs", "e2fsprogs"), ("xz", "xz-utils")];

/// What a kernel of the older series is built from.
const NEEDED_FOR_6_1: &[(&str, &str)] = &[("/usr/src/linux-source-6.1.tar.xz", "linux-source-6.1")];

/// Packages of what is not `there`, each once.
fn missing(needed: &[(&str, &'static str)], there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<_> = needed.iter().filter(|(name, _)| !there(name)).map(|(_, package)| *package).collect();
    packages.dedup();
    packages
}

/// Installs what is missing if this is root and apt is there; otherwise names it in a sentence and goes on.
///
/// # Errors
/// When installing fails, or in CI where it cannot be done.
pub(crate) fn ensure_installed() -> Result<()> {
    ensure(NEEDED)
}

/// The same for the lab.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_installed_for_lab() -> Result<()> {
    ensure_installed()?;
    ensure(NEEDED_FOR_LAB)
}

/// The same for Linux guests.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_installed_for_guests() -> Result<()> {
    ensure(NEEDED_FOR_GUESTS)
}

/// The same for kernels of the older series.
///
/// # Errors
/// As [`ensure_installed`].
pub(crate) fn ensure_installed_for_6_1() -> Result<()> {
    ensure(NEEDED_FOR_6_1)
}

/// Which packages the lab lacks, in a sentence.
pub(crate) fn missing_for_lab() -> Option<String> {
    let packages = missing(NEEDED_FOR_LAB, is_there);
    let list = packages.join(" ");
    (!packages.is_empty())
        .then(|| format!("it needs the Debian packages {list}: install them with `apt-get install {list}`"))
}

/// Whether a program, or a file where it has a path, is there.
fn is_there(name: &str) -> bool {
    Path::new(name).is_absolute() && Path::new(name).exists() || host::find_program(name).is_some()
}

fn ensure(needed: &[(&str, &'static str)]) -> Result<()> {
    let packages = missing(needed, is_there);
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
        note(format_args!("{text}; without, these tests say that they are skipped."));
        return Ok(());
    }
    apt::install(&packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_package_is_named_once_and_only_if_missing() {
        assert_eq!(
            missing(NEEDED, |name| name != "ip" && name != "tc" && name != "mkswap"),
            ["iproute2", "util-linux"]
        );
        assert!(missing(NEEDED_FOR_LAB, |_| true).is_empty());
    }
}
