//! Thermocline, by its command line.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Host, Machine, Migrated, Subject};
use crate::process::{PATIENCE, Process};

/// What its memory file is called.
const RAM: &str = "thermocline-guest-ram";
const LISTEN: &str = "tcp:127.0.0.1:0";
const ANNOUNCED: &str = "thermocline: waiting for a guest on ";

/// Thermocline with one policy for cold pages.
#[derive(Clone, Debug)]
pub(crate) struct Thermocline {
    program: PathBuf,
    name: String,
    cold: &'static str,
}

impl Thermocline {
    /// The program that `THERMOCLINE_BIN` names, or the one beside this.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn find(cold: &'static str) -> Result<Self> {
        let program = match std::env::var_os("THERMOCLINE_BIN") {
            Some(path) => PathBuf::from(path),
            None => std::env::current_exe()?.with_file_name("thermocline"),
        };
        ensure!(
            program.is_file(),
            "there is no {}: build it with `cargo build --release -p thermocline`",
            program.display()
        );
        Ok(Self { program, name: format!("thermocline-{cold}"), cold })
    }

    fn command(&self, subcommand: &str, control: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(subcommand).arg("--api-socket").arg(control);
        command
    }
}

impl Subject for Thermocline {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&self, folder: &Path, machine: &Machine) -> Result<Host> {
        let control = folder.join("source.sock");
        let mut command = self.command("run", &control);
        command.args(["--memory", &format!("{}MiB", machine.mib)]);
        command.args(["--kernel", &format!("workload:{}", machine.workload)]);
        Host::start(&mut command, machine, RAM, control)
    }

    fn receive(&self, folder: &Path, machine: &Machine) -> Result<Host> {
        let control = folder.join("destination.sock");
        let mut host =
            Host::start(self.command("receive", &control).args(["--listen", LISTEN]), machine, RAM, control)?;
        host.address = Some(host.process.wait_for_notice(ANNOUNCED)?);
        Ok(host)
    }

    /// From the start of `thermocline migrate`, a few milliseconds before the monitor hears of it, to its result, when
    /// the destination has paged out again what was cold.
    fn migrate(&self, source: &Host, destination: &Host) -> Result<Migrated> {
        let to = destination.address.as_deref().context("the destination does not listen")?;
        let mut command = self.command("migrate", &source.control);
        command.args(["--to", to, "--cold", self.cold, "--json"]);
        let start = Instant::now();
        let (client, lines) = Process::start(&mut command)?;
        while let Some(said) = lines.next(PATIENCE)? {
            let message: Value = serde_json::from_str(&said.text).context("the client's output")?;
            if let Some(report) = message.get("migrated") {
                let downtime = report["downtime_us"].as_u64().context("the report has no downtime_us")?;
                return Ok(Migrated {
                    total: said.at - start,
                    downtime: Duration::from_micros(downtime),
                    helpers_cpu: Duration::ZERO,
                });
            }
        }
        bail!("the migration failed: {}", client.complaints().trim())
    }
}
