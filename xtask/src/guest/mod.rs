//! `cargo xtask guest`: what can be booted besides the embedded workload.

pub(crate) mod linux;

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use command_line::{Output, note};
use linux_guest::Said;

use crate::lab::Series;
use crate::packages;
use crate::step::{build_release, program, shown};

/// Options of `cargo xtask guest`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    guest: Guest,
}

#[derive(Debug, Subcommand)]
enum Guest {
    /// Make a kernel, an initramfs and a disk of Debian's packages, and print the command that boots them.
    Linux(Linux),
}

#[derive(Debug, Args)]
struct Linux {
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value_t = Series::V6_12)]
    kernel: Series,
    /// The kernel of this package in its place: its name, or a .deb file.
    #[arg(long, value_name = "PACKAGE")]
    debian: Option<String>,
    /// The files in this folder, which were made elsewhere, in place of making them.
    #[arg(long, value_name = "FOLDER", conflicts_with = "debian")]
    from: Option<PathBuf>,
    /// Boot it here, with its console on this terminal.
    #[arg(long)]
    run: bool,
    /// Checks that the guest does before it powers itself off, in place of a shell, such as `cpus disk dmesg`.
    #[arg(long, value_name = "CHECK", num_args = 1..)]
    check: Vec<String>,
    /// Further options of `thermocline run`.
    #[arg(last = true, value_name = "OPTION")]
    options: Vec<String>,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    let Guest::Linux(linux) = &arguments.guest;
    let image = match &linux.from {
        // Thermocline is started in the workspace's folder.
        Some(folder) => linux::Image::in_folder(&std::path::absolute(folder)?),
        None => {
            packages::ensure_installed_for_guests()?;
            let image = linux::Image::get(linux.kernel, linux.debian.as_deref()).context("the Linux guest")?;
            image.copy_to_target(linux.kernel)?
        }
    };
    let mut output = Output::default();
    for file in [&image.kernel, &image.initramfs, &image.disk] {
        output.line(format_args!("{}", file.display()))?;
    }
    let mut words = image.options(&linux.check);
    words.extend(linux.options.iter().cloned());
    if !linux.run {
        let quoted: Vec<_> = words.iter().map(|word| quoted(word)).collect();
        output.line(format_args!("\nthermocline {}", quoted.join(" ")))?;
        return Ok(());
    }
    let [thermocline] = build_release(["thermocline"])?;
    let mut command = program(thermocline);
    command.args(words);
    note(format_args!("$ {}", shown(&command)));
    if !linux.check.is_empty() {
        return until_checked(&mut command, &linux.check);
    }
    // In this process's place: what ends this then reaches the guest.
    Err(command.exec()).context("thermocline cannot be started")
}

/// Runs a guest to its end, and shows what it says.
///
/// # Errors
/// When it has not said of each of these checks that it has passed, or does not end well.
fn until_checked(command: &mut Command, checks: &[String]) -> Result<()> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("it cannot be started")?;
    let console = child.stdout.take().context("the guest has no console")?;
    let mut output = Output::default();
    let mut heard = Vec::new();
    for line in BufReader::new(console).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        output.line(format_args!("{line}"))?;
        heard.extend(Said::parse(line));
    }
    let status = child.wait()?;
    ensure!(status.success(), "thermocline ended with {status}");
    let missing = not_passed(checks, &heard);
    ensure!(missing.is_empty(), "the guest has not passed: {}", missing.join(", "));
    Ok(())
}

/// Those of the checks that have not passed.
fn not_passed<'a>(checks: &'a [String], heard: &[Said]) -> Vec<&'a str> {
    let names = checks.iter().map(|check| check.split_once(':').map_or(check.as_str(), |(name, _)| name));
    let has_passed = |name: &str| heard.iter().any(|said| matches!(said, Said::Passed { check, .. } if check == name));
    names.filter(|name| !has_passed(name)).collect()
}

/// As a shell wants it.
fn quoted(word: &str) -> String {
    if word.contains(' ') { format!("'{word}'") } else { word.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_says_nothing_has_not_passed() {
        let heard = [
            Said::Passed { check: "disk".into(), found: String::new() },
            Said::Failed { check: "rng".into(), why: "none".into() },
        ];
        let checks = ["disk:vda", "rng", "cpus"].map(str::to_owned);
        assert_eq!(not_passed(&checks, &heard), ["rng", "cpus"]);
    }
}
