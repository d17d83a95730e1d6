//! The binaries under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

type Found = OnceLock<Result<PathBuf, String>>;

/// The path of `thermocline`: what `THERMOCLINE_BIN` says, or a release build made once.
///
/// # Errors
/// When it cannot be built.
pub fn thermocline() -> Result<&'static Path> {
    static PATH: Found = OnceLock::new();
    found(&PATH, "THERMOCLINE_BIN", "thermocline")
}

/// The path of `memory-agent`: what `MEMORY_AGENT_BIN` says, or a release build made once.
///
/// # Errors
/// When it cannot be built.
pub fn memory_agent() -> Result<&'static Path> {
    static PATH: Found = OnceLock::new();
    found(&PATH, "MEMORY_AGENT_BIN", "memory-agent")
}

fn found(path: &'static Found, variable: &str, package: &str) -> Result<&'static Path> {
    let path = path.get_or_init(|| find(variable, package).map_err(|e| format!("{e:#}")));
    path.as_deref().map_err(|e| anyhow!("no binary to test: {e}"))
}

fn find(variable: &str, package: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{variable}={} is no file", path.display());
        return Ok(path);
    }
    // The tests' own executable is TARGET/PROFILE/deps/NAME: the build goes where its parts are built already.
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(3).context("the tests' executable is not in a target directory")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--package", package, "--bin", package, "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .context("cargo cannot be started")?;
    ensure!(built.success(), "`cargo build --release --package {package}` failed");
    Ok(target.join("release").join(package))
}
