//! The project's programs and tests for the lab, linked statically: there is no library in it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use command_line::note;

use super::kernel::Series;
use super::qemu::Qemu;
use crate::guest::linux;
use crate::step::{cargo, root, shown};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Packages whose programs and tests go into the lab.
const PACKAGES: [&str; 3] = ["thermocline", "memory-agent", "thermocline-tests"];

/// Builds everything, and gives the folder that has it: programs and tests by their names, and the kernel's selftests.
///
/// # Errors
/// When something does not build.
pub(super) fn build() -> Result<PathBuf> {
    let folder = root().join("target/lab/payload");
    fs::create_dir_all(&folder)?;
    for command in [&["build"][..], &["test", "--no-run"]] {
        for (name, path) in executables(command, &PACKAGES)? {
            put(&path, &folder.join(name))?;
        }
    }
    selftests(&folder)?;
    Ok(folder)
}

/// Puts Linux guests beside them, and QEMU to compare with.
///
/// # Errors
/// When a guest cannot be made.
pub(super) fn add_linux(folder: &Path) -> Result<()> {
    for series in [Series::V6_12, Series::V6_1] {
        linux::Image::get(series, None)?.copy_to(&folder.join(format!("linux-{series}")))?;
    }
    Qemu::get()?.copy_to(&folder.join("qemu"))
}

/// Builds the kernel's selftests alone.
///
/// # Errors
/// When one does not build.
pub(super) fn build_selftests() -> Result<()> {
    let folder = root().join("target/lab/payload");
    fs::create_dir_all(&folder)?;
    selftests(&folder)
}

/// Builds one package alone, and gives its program of this name.
///
/// # Errors
/// When it does not build.
pub(crate) fn static_program(package: &str, name: &str) -> Result<PathBuf> {
    let found = executables(&["build"], &[package])?.into_iter().find(|(found, _)| found == name);
    found.map(|(_, path)| path).with_context(|| format!("{package} has no {name}"))
}

/// Puts a program into the folder, whole: a machine that runs may have the old one open.
fn put(program: &Path, place: &Path) -> Result<()> {
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    if modified(place) < modified(program) {
        let part = place.with_extension("part");
        fs::copy(program, &part)?;
        fs::rename(part, place)?;
    }
    Ok(())
}

/// Runs a cargo command for these packages, and gives what it made: programs and tests by their names.
fn executables(command: &[&str], packages: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let mut cargo = cargo();
    cargo.args(command).args(["--release", "--target", TARGET, "--target-dir"]).arg(root().join("target/lab"));
    cargo.args(packages.iter().flat_map(|package| ["--package", package]));
    // With a target given these are for what runs there, not for build scripts.
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
    // Tests unwind, and so dependencies are compiled once for programs and tests.
    cargo.envs([("CARGO_PROFILE_RELEASE_PANIC", "unwind"), ("CARGO_PROFILE_RELEASE_LTO", "off")]);
    cargo.env("THERMOCLINE_TESTS_EMULATED", "1");
    note(format_args!("$ {}", shown(&cargo)));
    cargo.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let mut child = cargo.spawn().context("cargo cannot be started")?;
    let messages = child.stdout.take().context("cargo has no output")?;
    let mut found = Vec::new();
    for line in BufReader::new(messages).lines() {
        let message: serde_json::Value = serde_json::from_str(&line?).unwrap_or_default();
        let (Some(path), Some(name)) = (message["executable"].as_str(), message["target"]["name"].as_str()) else {
            continue;
        };
        // The tests inside a library are a program beside those that it has; inside a program there are none.
        let is_test = message["profile"]["test"] == true;
        match message["target"]["kind"][0].as_str() {
            Some("lib") => found.push((format!("{name}-unit"), PathBuf::from(path))),
            Some("bin") if is_test => {}
            _ => found.push((name.to_owned(), PathBuf::from(path))),
        }
    }
    ensure!(child.wait()?.success(), "the build for the lab failed");
    Ok(found)
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
