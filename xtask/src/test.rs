//! `cargo xtask test`

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use command_line::{Output, note};

use crate::outcome::TestCounts;
use crate::step::{build_release, cargo, shown};
use crate::{host, lab, packages};

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only this package; may be repeated.
    #[arg(long, short, value_name = "NAME")]
    package: Vec<String>,
    /// Leave out the lab, where the project is tested on its own host kernel.
    #[arg(long)]
    no_lab: bool,
    /// Only tests whose names contain one of these, and other options of the test programs.
    #[arg(last = true, value_name = "NAME")]
    filter: Vec<String>,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    packages::ensure_installed()?;
    // Whole processes are tested as they are shipped; everything else in the profile that checks its arithmetic.
    let [thermocline, agent] = build_release(["thermocline", "memory-agent"])?;

    let mut command = cargo();
    command.args(["test", "--no-fail-fast"]);
    if arguments.package.is_empty() {
        command.arg("--workspace");
    }
    command.args(arguments.package.iter().flat_map(|package| ["--package", package]));
    command.args(["--", "--show-output"]).args(&arguments.filter);
    command.env("THERMOCLINE_BIN", &thermocline).env("MEMORY_AGENT_BIN", &agent);
    // Who runs this has been told that it needs swap, networks and control groups of its own.
    command.env("THERMOCLINE_TESTS_USE_HOST", "1");
    note(format_args!("$ {}", shown(&command)));
    let mut child = command.stdout(Stdio::piped()).spawn().context("cargo cannot be started")?;
    let said = child.stdout.take().context("cargo has no output")?;
    let mut outcome = TestCounts::default();
    let mut output = Output::default();
    // Bytes, not lines of UTF-8: a failing test may show anything.
    for line in BufReader::new(said).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if outcome.read(&line) {
            output.line(format_args!("{line}"))?;
        }
    }
    let status = child.wait()?;
    output.line(format_args!("\n{outcome}, {:.0} s so far.", started.elapsed().as_secs_f64()))?;
    if !status.success() {
        bail!("there are tests that did not pass");
    }
    if !outcome.skipped().is_empty() && host::is_ci() && host::is_root() && host::has_kvm() {
        bail!("with CI=true nothing may be skipped on a machine with /dev/kvm and root");
    }
    // A part of the tests was asked for, and the lab is none.
    if arguments.no_lab || !arguments.package.is_empty() || !arguments.filter.is_empty() {
        return Ok(());
    }
    match lab::missing() {
        Some(why) if host::is_ci() => bail!("the lab cannot be left out with CI=true: {why}"),
        Some(why) => output.line(format_args!("skipped the lab: {why}"))?,
        None => lab::test_both()?,
    }
    output.line(format_args!("{:.0} s in all.", started.elapsed().as_secs_f64()))?;
    Ok(())
}
