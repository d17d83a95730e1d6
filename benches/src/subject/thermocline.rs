//! Thermocline, by its command line.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Faults, GuestSpec, Host, Migrated, Subject, Tail};
use crate::lines::Lines;
use crate::process::{Process, TIMEOUT};

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
    /// More options of `thermocline migrate`.
    more: Vec<&'static str>,
}

/// A client that has asked for a migration.
pub(crate) struct Client {
    process: Process,
    lines: Lines,
    started: Instant,
}

/// How a client ended.
pub(crate) enum Ending {
    Migrated(Migrated),
    /// With this exit code and sentence.
    Failed(Option<i32>, String),
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
        Ok(Self { program, name: format!("thermocline-{cold}"), cold, more: Vec::new() })
    }

    /// The same, called `name`, with these options of `thermocline migrate`.
    pub(crate) fn with(self, name: &str, more: &[&'static str]) -> Self {
        Self { name: name.to_owned(), more: more.to_vec(), ..self }
    }

    /// A subcommand, behind the words that make it run elsewhere, if any.
    fn command(&self, behind: &[&str], subcommand: &str, control: &Path) -> Command {
        let mut command = match behind.split_first() {
            None => Command::new(&self.program),
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(&self.program);
                command
            }
        };
        command.arg(subcommand).arg("--api-socket").arg(control);
        command
    }

    /// Boots the machine, behind these words.
    pub(crate) fn run_behind(&self, behind: &[&str], folder: &Path, machine: &GuestSpec) -> Result<Host> {
        self.run_with(behind, folder, machine, &[])
    }

    /// Boots the machine with more options, behind these words.
    pub(crate) fn run_with(&self, behind: &[&str], folder: &Path, machine: &GuestSpec, more: &[&str]) -> Result<Host> {
        let control = folder.join("source.sock");
        let mut command = self.command(behind, "run", &control);
        command.args(["--memory", &format!("{}MiB", machine.mib)]);
        command.args(["--kernel", &format!("workload:{}", machine.workload)]).args(more);
        Host::start(&mut command, machine, RAM, control)
    }

    /// Waits for the machine, behind these words; `name` is the destination's own in the folder.
    pub(crate) fn receive_behind(
        &self,
        behind: &[&str],
        listen: &str,
        (folder, name): (&Path, &str),
        machine: &GuestSpec,
    ) -> Result<Host> {
        self.receive_with(behind, listen, (folder, name), machine, &[])
    }

    /// The same with more options.
    pub(crate) fn receive_with(
        &self,
        behind: &[&str],
        listen: &str,
        (folder, name): (&Path, &str),
        machine: &GuestSpec,
        more: &[&str],
    ) -> Result<Host> {
        let control = folder.join(format!("{name}.sock"));
        let mut command = self.command(behind, "receive", &control);
        let mut host = Host::start(command.args(["--listen", listen]).args(more), machine, RAM, control)?;
        host.address = Some(host.process.wait_for_notice(ANNOUNCED)?);
        Ok(host)
    }

    /// Asks a machine's monitor something, as `thermocline ctl` does; what it prints.
    fn ctl(&self, host: &Host, request: &[&str]) -> Result<String> {
        let output = self.command(&[], "ctl", &host.control).args(request).output().context("thermocline ctl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "thermocline ctl {}: {}", request.join(" "), said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Asks for a migration.
    pub(crate) fn begin(&self, source: &Host, destination: &Host) -> Result<Client> {
        let to = destination.address.as_deref().context("the destination does not listen")?;
        let mut command = self.command(&[], "migrate", &source.control);
        command.args(["--to", to, "--cold", self.cold, "--json"]).args(&self.more);
        let started = Instant::now();
        let (process, lines) = Process::start(&mut command)?;
        Ok(Client { process, lines, started })
    }
}

impl Client {
    /// Waits for its end; calls `there` once post-copy has begun.
    pub(crate) fn finish(mut self, there: &mut dyn FnMut() -> Result<()>) -> Result<Ending> {
        let mut is_there = false;
        while let Some(said) = self.lines.next(TIMEOUT)? {
            let message: Value = serde_json::from_str(&said.text).context("the client's output")?;
            if !is_there && message["progress"]["phase"] == "post_copy" {
                is_there = true;
                there()?;
            }
            if let Some(report) = message.get("migrated") {
                return Ok(Ending::Migrated(migrated_of(report, said.at - self.started)?));
            }
        }
        let status = self.process.wait()?;
        Ok(Ending::Failed(status.code(), self.process.complaints().trim().to_owned()))
    }
}

fn migrated_of(report: &Value, total: Duration) -> Result<Migrated> {
    let number = |value: &Value, key| value[key].as_u64().with_context(|| format!("the report has no {key}"));
    let post_copy = &report["post_copy"];
    let post_copy = match post_copy {
        Value::Null => None,
        post_copy => Some(Tail {
            time: Duration::from_millis(number(post_copy, "ms")?),
            faults: faults_of(&post_copy["faults"]),
        }),
    };
    Ok(Migrated {
        switchover: Duration::from_millis(number(report, "total_ms")?),
        swap_ins_before_switchover: number(report, "swap_ins_before_switchover")?,
        post_copy,
        total,
        downtime: Duration::from_micros(number(report, "downtime_us")?),
        helpers_cpu: Duration::ZERO,
    })
}

fn faults_of(figures: &Value) -> Option<Faults> {
    let number = |key| figures[key].as_u64();
    Some(Faults {
        count: number("count")?,
        p50_us: number("p50_us")?,
        p99_us: number("p99_us")?,
        max_us: number("max_us")?,
    })
}

impl Subject for Thermocline {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&self, folder: &Path, machine: &GuestSpec) -> Result<Host> {
        self.run_behind(&[], folder, machine)
    }

    fn receive(&self, folder: &Path, machine: &GuestSpec) -> Result<Host> {
        self.receive_behind(&[], LISTEN, (folder, "destination"), machine)
    }

    /// From the start of `thermocline migrate`, a few milliseconds before the monitor hears of it, to its result, when
    /// the destination has paged out again what was cold. The switchover is by the monitor's account.
    fn migrate(&self, source: &Host, destination: &Host, there: &mut dyn FnMut() -> Result<()>) -> Result<Migrated> {
        match self.begin(source, destination)?.finish(there)? {
            Ending::Migrated(migrated) => Ok(migrated),
            Ending::Failed(_, why) => bail!("the migration failed: {why}"),
        }
    }

    fn faults_so_far(&self, destination: &Host) -> Result<Option<Faults>> {
        let status: Value = serde_json::from_str(&self.ctl(destination, &["status"])?).context("the status")?;
        Ok(faults_of(&status["post_copy"]["faults"]))
    }

    fn release(&self, source: &Host) -> Result<()> {
        if self.more.contains(&"--stay") {
            self.ctl(source, &["quit"])?;
        }
        Ok(())
    }
}
