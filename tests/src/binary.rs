//! The binary under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

/// Names a binary to test instead of building one.
const VARIABLE: &str = "THERMOCLINE_BIN";

/// The path of `thermocline`: what `THERMOCLINE_BIN` says, or a release build made once.
///
/// # Errors
/// When it cannot be built.
pub fn thermocline() -> Result<&'static Path> {
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let path = PATH.get_or_init(|| find().map_err(|e| format!("{e:#}")));
    path.as_deref().map_err(|e| anyhow::anyhow!("no binary to test: {e}"))
}

fn find() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{VARIABLE}={} is no file", path.display());
        return Ok(path);
    }
    // The tests' own executable is TARGET/PROFILE/deps/NAME: the build goes where its parts are built already.
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(3).context("the tests' executable is not in a target directory")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--release", "-p", "thermocline", "--bin", "thermocline", "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .context("cargo cannot be started")?;
    ensure!(built.success(), "`cargo build --release -p thermocline` failed");
    Ok(target.join("release/thermocline"))
}
