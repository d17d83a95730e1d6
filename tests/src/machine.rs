//! A machine: a `thermocline run` or `receive` with its console and API socket.

use std::cell::Cell;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use thermocline::control::client::{ClientError, ask};
use thermocline::control::{Answer, PagesReport, Request, RunState, Status};
use workload_guest::report::Ready;

use crate::binary;
use crate::console::GuestConsole;
use crate::migration::{How, Migration};
use crate::process::{Ended, Process, Standard, TIMEOUT};

/// How long a monitor that does not answer may take to end.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(2);

/// A folder for one trial, with all that it starts in it.
#[derive(Debug)]
pub struct Sandbox {
    folder: TempDir,
    names: Cell<u32>,
}

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Memory of the machine, MiB.
    pub memory: u64,
    /// MiB that are read and written all the time.
    pub working_set: u64,
    /// MiB that are written once.
    pub cold: u64,
    /// Page operations a second; 0 for as many as it can.
    pub rate: u64,
    /// Percent of them that write.
    pub writes: u32,
    /// vCPUs.
    pub cpus: u8,
}

impl Default for Workload {
    fn default() -> Self {
        Self { memory: 64, working_set: 16, cold: 16, rate: 2000, writes: 50, cpus: 1 }
    }
}

impl Workload {
    /// Bytes that the guest has filled.
    pub fn bytes(&self) -> u64 {
        (self.working_set + self.cold) << 20
    }

    /// The arguments of `run`.
    pub fn arguments(&self) -> Vec<String> {
        let Self { memory, working_set, cold, rate, writes, cpus } = self;
        let kernel = format!("workload:working-set={working_set}MiB,cold={cold}MiB,rate={rate},writes={writes}");
        ["--memory", &format!("{memory}MiB"), "--cpus", &cpus.to_string(), "--kernel", &kernel].map(Into::into).into()
    }
}

impl Sandbox {
    /// An empty folder.
    ///
    /// # Errors
    /// When there is no room for one.
    pub fn new() -> Result<Self> {
        Ok(Self { folder: TempDir::with_prefix("thermocline-tests-")?, names: Cell::new(0) })
    }

    /// A path in the folder where nothing is yet.
    pub fn path(&self, name: &str) -> PathBuf {
        self.names.set(self.names.get() + 1);
        self.folder.path().join(format!("{}-{name}", self.names.get()))
    }

    /// `thermocline` with these arguments, not started.
    ///
    /// # Errors
    /// When there is no binary.
    pub fn command(&self, arguments: &[&str]) -> Result<Vec<OsString>> {
        let program = binary::thermocline()?.as_os_str().to_owned();
        Ok(std::iter::once(program).chain(arguments.iter().map(Into::into)).collect())
    }

    /// Starts `thermocline` with these arguments.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        Process::start(name, &self.command(arguments)?, Standard::Pipes)
    }

    /// Starts a guest and waits until it works.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn boot(&self, workload: &Workload) -> Result<Machine> {
        self.boot_behind(&[], workload)
    }

    /// The same behind a command that starts it, such as `ip netns exec NAME`.
    ///
    /// # Errors
    /// As [`Sandbox::boot`].
    pub fn boot_behind(&self, prefix: &[&str], workload: &Workload) -> Result<Machine> {
        self.boot_as(prefix, &[], workload)
    }

    /// The same with more options of `thermocline run`.
    ///
    /// # Errors
    /// As [`Sandbox::boot`].
    pub fn boot_with(&self, more: &[&str], workload: &Workload) -> Result<Machine> {
        self.boot_as(&[], more, workload)
    }

    /// Starts a small guest that drives devices: `guest` are its own options for them, `more` the options of `thermocline run`.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn boot_devices(&self, prefix: &[&str], guest: &str, more: &[&str]) -> Result<Machine> {
        let workload = Workload { memory: 64, working_set: 2, cold: 0, rate: 100, writes: 50, cpus: 1 };
        self.boot_driving(prefix, &workload, guest, more)
    }

    /// The same with another workload beside.
    ///
    /// # Errors
    /// As [`Sandbox::boot_devices`].
    pub fn boot_driving(&self, prefix: &[&str], workload: &Workload, guest: &str, more: &[&str]) -> Result<Machine> {
        let mut arguments = workload.arguments();
        if let Some(kernel) = arguments.last_mut() {
            kernel.push(',');
            kernel.push_str(guest);
        }
        self.boot_arguments(prefix, arguments, more, workload)
    }

    fn boot_as(&self, prefix: &[&str], more: &[&str], workload: &Workload) -> Result<Machine> {
        self.boot_arguments(prefix, workload.arguments(), more, workload)
    }

    fn boot_arguments(
        &self,
        prefix: &[&str],
        of_workload: Vec<String>,
        more: &[&str],
        workload: &Workload,
    ) -> Result<Machine> {
        let api = self.path("source.sock");
        let mut arguments: Vec<OsString> = vec!["run".into(), "--api-socket".into(), api.clone().into()];
        arguments.extend(of_workload.into_iter().map(Into::into));
        arguments.extend(more.iter().map(Into::into));
        let machine = self.machine("source", prefix, arguments, api, workload)?;
        machine.console.ready()?;
        Ok(machine)
    }

    /// Starts the other side, on a port of its own, which ends at whatever fails first.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn receive(&self, workload: &Workload) -> Result<Destination> {
        self.receive_on("tcp:127.0.0.1:0", &[], workload)
    }

    /// Starts the other side, which goes on listening until a guest is there.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn listen_on(&self, listen: &str, workload: &Workload) -> Result<Destination> {
        self.destination(&[], listen, &[], workload)
    }

    /// Starts the other side, which ends at whatever fails first.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn receive_on(&self, listen: &str, more: &[&str], workload: &Workload) -> Result<Destination> {
        self.receive_behind(&[], listen, more, workload)
    }

    /// The same behind a command that starts it.
    ///
    /// # Errors
    /// As [`Sandbox::receive_on`].
    pub fn receive_behind(
        &self,
        prefix: &[&str],
        listen: &str,
        more: &[&str],
        workload: &Workload,
    ) -> Result<Destination> {
        self.destination(prefix, listen, &[&["--once"], more].concat(), workload)
    }

    fn destination(&self, prefix: &[&str], listen: &str, more: &[&str], workload: &Workload) -> Result<Destination> {
        let api = self.path("destination.sock");
        let mut arguments: Vec<OsString> =
            ["receive", "--listen", listen, "--api-socket"].into_iter().map(Into::into).collect();
        arguments.push(api.clone().into());
        arguments.extend(more.iter().map(Into::into));
        let machine = self.machine("destination", prefix, arguments, api, workload)?;
        let address = listening(&machine.process)?;
        Ok(Destination { machine, address })
    }

    fn machine(
        &self,
        name: &str,
        prefix: &[&str],
        arguments: Vec<OsString>,
        api: PathBuf,
        workload: &Workload,
    ) -> Result<Machine> {
        let mut command: Vec<OsString> = prefix.iter().map(Into::into).collect();
        command.extend(self.command(&[])?);
        command.extend(arguments);
        let mut process = Process::start(name, &command, Standard::Pipes)?;
        let input = process.stdin.take().map(|stdin| Box::new(stdin) as _);
        let console = GuestConsole::new(process.stdout.clone(), input);
        Ok(Machine { process, console, api, workload: *workload })
    }
}

/// Waits until a `receive` listens; its address, for `--to`.
pub(crate) fn listening(process: &Process) -> Result<String> {
    let announced = process
        .stderr
        .wait_for(0, TIMEOUT, |line| line.strip_prefix("thermocline: waiting for a guest on ").map(str::to_owned));
    Ok(announced.with_context(|| format!("not listening: {:?}", process.stderr.lines()))?.1)
}

/// A machine with a console on standard input and output.
#[derive(Debug)]
pub struct Machine {
    /// The monitor.
    pub process: Process,
    /// The guest's serial port.
    pub console: GuestConsole,
    /// The API socket.
    pub api: PathBuf,
    /// What the guest does.
    pub workload: Workload,
}

/// A machine that waits for its guest.
#[derive(Debug)]
pub struct Destination {
    /// The machine.
    pub machine: Machine,
    /// Where it listens, for `--to`.
    pub address: String,
}

impl Machine {
    /// Asks the monitor.
    ///
    /// # Errors
    /// When it says no.
    pub fn ask(&self, request: &Request) -> Result<Answer, ClientError> {
        let answer = ask(&self.api, request, |_| {});
        if let Err(ClientError::Connect { .. } | ClientError::Gone | ClientError::Io(_)) = &answer {
            // Its last words say why, and come behind the end of its socket. That it has not ended is as well.
            let _ = self.process.wait_within(LAST_WORDS);
        }
        answer
    }

    /// What the monitor says that it does.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<Status> {
        match self.ask(&Request::Status {})? {
            Answer::Status(status) => Ok(status),
            other => bail!("{other:?} to status"),
        }
    }

    /// What guest RAM is, by the monitor.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn pages(&self) -> Result<PagesReport> {
        match self.ask(&Request::Pages { cells: 0, from_agent: false })? {
            Answer::Pages(pages) => Ok(pages),
            other => bail!("{other:?} to pages"),
        }
    }

    /// Runs `thermocline ctl` to its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn ctl(&self, arguments: &[&str]) -> Result<(Ended, Vec<String>)> {
        ctl(&self.api, arguments)
    }

    /// Starts a migration.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn migrate(&self, to: &str, how: &How) -> Result<Migration> {
        Migration::start(&self.api, to, how)
    }

    /// Pages out the guest's cold pages.
    ///
    /// # Errors
    /// When that is refused.
    pub fn page_out_cold(&self, ready: &Ready) -> Result<()> {
        let ranges = ready.cold.iter().map(|extent| (extent.start, extent.len)).collect();
        match self.ask(&Request::PageOut { ranges: Some(ranges) })? {
            Answer::PageOut(_) => Ok(()),
            other => bail!("{other:?} to page-out"),
        }
    }

    /// Checks that the guest runs here, belongs here and has lost nothing.
    ///
    /// # Errors
    /// When it does not.
    pub fn must_go_on(&mut self) -> Result<()> {
        let state = self.status()?.state;
        anyhow::ensure!(state == RunState::Running, "the machine is {state:?}");
        self.console.must_run()?;
        self.console.check(self.workload.bytes())?;
        Ok(())
    }
}

/// Runs `thermocline ctl` to its end: how it ended, and what it printed.
///
/// # Errors
/// When it does not end.
pub fn ctl(api: &Path, arguments: &[&str]) -> Result<(Ended, Vec<String>)> {
    let mut command: Vec<OsString> = vec![binary::thermocline()?.into(), "ctl".into(), "--api-socket".into()];
    command.push(api.into());
    command.extend(arguments.iter().map(Into::into));
    let process = Process::start("ctl", &command, Standard::Pipes)?;
    Ok((process.wait()?, process.stdout.lines()))
}
