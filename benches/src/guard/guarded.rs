//! A monitor that is migrated by itself, with `memory-agent guard` beside it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::lines::Lines;
use crate::process::{Process, TIMEOUT};
use crate::subject::{GuestSpec, Host, Migrated, Subject};

const READY: &str = "memory-agent: guarding PID ";

/// `memory-agent`, the program.
#[derive(Clone, Debug)]
pub(super) struct MemoryAgent {
    program: PathBuf,
}

impl MemoryAgent {
    /// The program that `MEMORY_AGENT_BIN` names, or the one beside this.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn find() -> Result<Self> {
        let program = match std::env::var_os("MEMORY_AGENT_BIN") {
            Some(path) => PathBuf::from(path),
            None => std::env::current_exe()?.with_file_name("memory-agent"),
        };
        let found = program.is_file();
        ensure!(found, "there is no {}: build it with `cargo build --release -p memory-agent`", program.display());
        Ok(Self { program })
    }

    /// One of its commands, for a host's memory.
    pub(super) fn command(&self, subcommand: &str, host: &Host) -> Command {
        let mut command = Command::new(&self.program);
        let pid = host.process.pid().to_string();
        match subcommand {
            // Its own subcommand comes first.
            "scan" => command.args(["scan", "hash"]),
            other => command.arg(other),
        };
        command.args(["--pid", &pid, "--name", host.ram_name(), "--json"]);
        command
    }

    /// The map of a host's memory, in a file.
    fn map(&self, host: &Host, file: &Path) -> Result<()> {
        let output = self.command("map", host).output().context("memory-agent map")?;
        ensure!(output.status.success(), "memory-agent map: {}", String::from_utf8_lossy(&output.stderr));
        std::fs::write(file, output.stdout).context("the map")
    }

    /// Begins to guard a host's memory.
    fn guard(&self, host: &Host, window_mib: u64, like: Option<&Path>) -> Result<Guarding> {
        let mut command = self.command("guard", host);
        command.args(["--window", &format!("{window_mib}MiB")]);
        if let Some(map) = like {
            command.arg("--like").arg(map);
        }
        let (process, lines) = Process::start(&mut command)?;
        process.wait_for_notice(READY)?;
        Ok(Guarding { process, lines })
    }
}

struct Guarding {
    process: Process,
    lines: Lines,
}

impl Guarding {
    /// Has it restore what is left, and waits for its end; the CPU time it took.
    fn finish(self) -> Result<Duration> {
        self.process.interrupt()?;
        let Some(_report) = self.lines.next(TIMEOUT)? else {
            bail!("the guard has no result: {}", self.process.complaints().trim());
        };
        self.process.cpu_time()
    }
}

/// A monitor whose memory is guarded while it is migrated.
pub(super) struct Guarded<'s> {
    pub(super) subject: &'s dyn Subject,
    pub(super) agent: MemoryAgent,
    pub(super) window_mib: u64,
    /// Whether the destination is guarded too.
    pub(super) both: bool,
    /// For the map.
    pub(super) folder: PathBuf,
}

impl Subject for Guarded<'_> {
    fn name(&self) -> &str {
        self.subject.name()
    }

    fn run(&self, folder: &Path, machine: &GuestSpec) -> Result<Host> {
        self.subject.run(folder, machine)
    }

    fn receive(&self, folder: &Path, machine: &GuestSpec) -> Result<Host> {
        self.subject.receive(folder, machine)
    }

    /// As the subject does; the time goes on until the guards are done too.
    fn migrate(&self, source: &Host, destination: &Host, there: &mut dyn FnMut() -> Result<()>) -> Result<Migrated> {
        let map = self.folder.join("map.json");
        self.agent.map(source, &map)?;
        let here = self.agent.guard(source, self.window_mib, None)?;
        let guard_there = self.both.then(|| self.agent.guard(destination, self.window_mib, Some(&map))).transpose()?;
        let start = Instant::now();
        let migrated = self.subject.migrate(source, destination, there)?;
        let mut helpers_cpu = here.finish()?;
        if let Some(guard) = guard_there {
            helpers_cpu += guard.finish()?;
        }
        Ok(Migrated { total: start.elapsed(), helpers_cpu, ..migrated })
    }
}
