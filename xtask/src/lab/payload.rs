//! The project's programs and tests for the lab, linked statically: there is no library in it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::step::{cargo, root, shown};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Packages whose programs and tests go into the lab.
const PACKAGES: [&str; 2] = ["thermocline", "memory-agent"];

/// Builds everything, and gives the folder that has it: programs and tests by their names, and the kernel's selftests.
///
/// # Errors
/// When something does not build.
pub(super) fn build() -> Result<PathBuf> {
    let target_dir = root().join("target/lab");
    let folder = target_dir.join("payload");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    executables(&["build"], &target_dir, &folder)?;
    executables(&["test", "--no-run"], &target_dir, &folder)?;
    selftests(&folder)?;
    Ok(folder)
}

/// Runs a cargo command, and links what it made into the folder.
fn executables(command: &[&str], target_dir: &Path, folder: &Path) -> Result<()> {
    let mut cargo = cargo();
    cargo.args(command).args(["--release", "--target", TARGET, "--target-dir"]).arg(target_dir);
    cargo.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    // With a target given these are for what runs there, not for build scripts.
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
    // Tests unwind, and so dependencies are compiled once for programs and tests.
    cargo.envs([("CARGO_PROFILE_RELEASE_PANIC", "unwind"), ("CARGO_PROFILE_RELEASE_LTO", "off")]);
    eprintln!("$ {}", shown(&cargo));
    cargo.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let mut child = cargo.spawn().context("cargo cannot be started")?;
    let messages = child.stdout.take().context("cargo has no output")?;
    let mut found = Vec::new();
    for line in BufReader::new(messages).lines() {
        let message: serde_json::Value = serde_json::from_str(&line?).unwrap_or_default();
        let (Some(path), Some(name)) = (message["executable"].as_str(), message["target"]["name"].as_str()) else {
            continue;
        };
        // A library's tests are its own, of a program there are none here.
        let is_library = message["target"]["kind"][0] == "lib";
        found.push((if is_library { format!("{name}-unit") } else { name.to_owned() }, PathBuf::from(path)));
    }
    ensure!(child.wait()?.success(), "the build for the lab failed");
    for (name, path) in found {
        let place = folder.join(name);
        if !place.exists() {
            fs::copy(path, place)?;
        }
    }
    Ok(())
}

/// The kernel's selftests, one program a C file.
fn selftests(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(root().join("host-kernel/selftests")).context("host-kernel/selftests")? {
        let source = entry?.path();
        if source.extension().is_some_and(|extension| extension == "c") {
            let place = folder.join(source.file_stem().unwrap_or_default());
            let mut gcc = Command::new("gcc");
            gcc.args(["-O2", "-Wall", "-static", "-pthread", "-o"]).arg(&place).arg(&source);
            crate::step::run(&mut gcc)?;
        }
    }
    Ok(())
}
