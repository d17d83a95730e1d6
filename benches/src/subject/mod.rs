//! A monitor that is measured: how it runs a guest, waits for one, and migrates it.

pub(crate) mod thermocline;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use workload_guest::Options;

use crate::console::GuestConsole;
use crate::guest_ram::GuestRam;
use crate::process::Process;

/// A machine, the same for every subject.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestSpec {
    /// Guest RAM, MiB; below the 32-bit hole, so that it is one memory file.
    pub(crate) mib: u64,
    /// What the embedded guest does in it.
    pub(crate) workload: Options,
}

/// A monitor with its guest, or waiting for one.
#[derive(Debug)]
pub(crate) struct Host {
    /// The monitor.
    pub(crate) process: Process,
    /// When it was started.
    pub(crate) started: Instant,
    /// The guest's serial port.
    pub(crate) console: GuestConsole,
    /// What the name of the memory file contains.
    ram_name: &'static str,
    ram_bytes: u64,
    /// The control socket.
    pub(crate) control: PathBuf,
    /// Where it waits for a guest.
    pub(crate) address: Option<String>,
}

impl Host {
    /// Starts a monitor whose standard input and output are the guest's serial port.
    pub(crate) fn start(
        command: &mut std::process::Command,
        machine: &GuestSpec,
        ram_name: &'static str,
        control: PathBuf,
    ) -> Result<Self> {
        let started = Instant::now();
        let (mut process, lines) = Process::start(command)?;
        let console = GuestConsole::new(process.input.take().context("no pipe to the process")?, lines);
        Ok(Self { process, started, console, ram_name, ram_bytes: machine.mib << 20, control, address: None })
    }

    /// What the name of its memory file contains.
    pub(crate) fn ram_name(&self) -> &'static str {
        self.ram_name
    }

    /// The guest's memory; at a destination there may be none before the guest comes.
    pub(crate) fn ram(&self) -> Result<GuestRam> {
        GuestRam::open(self.process.pid(), self.ram_name, self.ram_bytes)
    }
}

/// How long the guest waited for pages sent by post-copy, by the monitor's own account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Faults {
    /// Pages it waited for.
    pub(crate) count: u64,
    /// Median, microseconds.
    pub(crate) p50_us: u64,
    /// 99 of 100 were quicker, microseconds.
    pub(crate) p99_us: u64,
    /// The longest, microseconds.
    pub(crate) max_us: u64,
}

/// What post-copy sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    /// From the guest's running at the destination to the last page.
    pub(crate) time: Duration,
    /// How long the guest waited; `None` when the monitor does not tell.
    pub(crate) faults: Option<Faults>,
}

/// A migration that succeeded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Migrated {
    /// Until the guest ran at the destination.
    pub(crate) switchover: Duration,
    /// Pages swapped in on this host until then, by anyone.
    pub(crate) swap_ins_before_switchover: u64,
    /// What post-copy sent, if anything could.
    pub(crate) post_copy: Option<Tail>,
    /// From the command to the monitors saying that all is done, seen from outside.
    pub(crate) total: Duration,
    /// How long the guest was paused, by the monitor's own account.
    pub(crate) downtime: Duration,
    /// CPU time of programs that were there for the migration besides the monitors.
    pub(crate) helpers_cpu: Duration,
}

/// A monitor that is measured.
pub(crate) trait Subject {
    /// Its name in tables.
    fn name(&self) -> &str;

    /// Boots the machine.
    fn run(&self, folder: &Path, machine: &GuestSpec) -> Result<Host>;

    /// Waits for the machine to come in, on a port of loopback TCP.
    fn receive(&self, folder: &Path, machine: &GuestSpec) -> Result<Host>;

    /// Migrates the machine and waits until both sides are done. With post-copy, `there` is called while they
    /// do.
    fn migrate(&self, source: &Host, destination: &Host, there: &mut dyn FnMut() -> Result<()>) -> Result<Migrated>;

    /// How long the guest has waited so far for outstanding pages, where the monitor tells.
    fn faults_so_far(&self, _destination: &Host) -> Result<Option<Faults>> {
        Ok(None)
    }

    /// Ends a source that is still there after its guest has gone, as its user would.
    fn release(&self, _source: &Host) -> Result<()> {
        Ok(())
    }
}
