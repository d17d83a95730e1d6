//! Steps: cargo and other programs, run in the workspace, each shown before it runs.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use command_line::note;

/// The workspace's directory.
pub(crate) fn root() -> PathBuf {
    // Cargo says where it found this package, which is right also when the checkout has moved since it was built.
    let own = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&own).parent().map_or_else(|| ".".into(), Path::to_path_buf)
}

/// The cargo that runs this.
pub(crate) fn cargo() -> Command {
    program(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A program, in the workspace's directory.
pub(crate) fn program(name: impl Into<OsString>) -> Command {
    let mut command = Command::new(name.into());
    command.current_dir(root());
    command
}

/// The command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs a command to its end.
///
/// # Errors
/// When it cannot be started or fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    note(format_args!("$ {}", shown(command)));
    let status = command.status().with_context(|| format!("`{}` cannot be started", shown(command)))?;
    ensure!(status.success(), "`{}` failed: {status}", shown(command));
    Ok(())
}

/// Builds these packages for release; the paths of the programs that have the packages' names.
///
/// # Errors
/// When they cannot be built, or one has no such program.
pub(crate) fn build_release<const N: usize>(packages: [&str; N]) -> Result<[PathBuf; N]> {
    build(packages, &["--release"])
}

/// The same with other options of `cargo build`.
///
/// # Errors
/// As [`build_release`].
pub(crate) fn build<const N: usize>(packages: [&str; N], options: &[&str]) -> Result<[PathBuf; N]> {
    let mut command = cargo();
    command.arg("build").args(options).args(packages.iter().flat_map(|package| ["--package", package]));
    note(format_args!("$ {}", shown(&command)));
    command.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let mut child = command.spawn().context("cargo cannot be started")?;
    let messages = child.stdout.take().context("cargo has no output")?;
    let mut paths = packages.map(|_| PathBuf::new());
    for line in BufReader::new(messages).lines() {
        // Cargo alone knows where its target directory is, and says where it put each program.
        let message: serde_json::Value = serde_json::from_str(&line?).unwrap_or_default();
        let Some(path) = message["executable"].as_str() else { continue };
        if let Some(index) = packages.iter().position(|package| message["target"]["name"] == *package) {
            paths[index] = path.into();
        }
    }
    ensure!(child.wait()?.success(), "the build failed");
    ensure!(paths.iter().all(|path| path.is_file()), "cargo did not say where it put {packages:?}");
    Ok(paths)
}
