//! Stock QEMU on KVM, with guest RAM on a shared memfd, as Thermocline has it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use memory_agent::SwapCounters;
use serde_json::{Value, json};
use workload_guest::ELF;

use super::qmp::{Qmp, Refused};
use crate::process::TIMEOUT;
use crate::stop;
use crate::subject::{GuestSpec, Host, Migrated, Subject, Tail};

const PROGRAM: &str = "qemu-system-x86_64";
/// What its memory file is called.
const RAM: &str = "memory-backend-memfd";
/// A small firmware that hands over to the guest at once. QEMU's default takes seconds where KVM emulates ring 0.
const FIRMWARE: &str = "qboot.rom";
/// Bytes a second: more than any connection carries. What QEMU does without being asked is 128 MiB.
const UNLIMITED: u64 = 1 << 40;

/// Stock QEMU.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    version: String,
    firmware: bool,
    post_copy: bool,
}

impl Qemu {
    /// The QEMU of this host.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn find() -> Result<Self> {
        let ask = |argument: &[&str]| {
            let output = Command::new(PROGRAM).args(argument).output();
            let output = output.with_context(|| format!("no {PROGRAM}: install the Debian package qemu-system-x86"))?;
            anyhow::Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let version = ask(&["--version"])?.lines().next().unwrap_or_default().to_owned();
        let firmware = ask(&["-L", "help"])?.lines().any(|folder| Path::new(folder).join(FIRMWARE).is_file());
        Ok(Self { version, firmware, post_copy: false })
    }

    /// The same, whose guest runs at the destination first, with its memory by post-copy.
    pub(crate) fn post_copy(&self) -> Self {
        Self { post_copy: true, ..self.clone() }
    }

    /// What it says of itself.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    fn start(&self, folder: &Path, machine: &GuestSpec, name: &str, more: &[&str]) -> Result<Host> {
        self.start_behind(&[], folder, machine, name, more)
    }

    /// Boots the machine with more options, behind words that make it run elsewhere, if any. Its threads have names.
    pub(crate) fn run_behind(
        &self,
        behind: &[&str],
        folder: &Path,
        machine: &GuestSpec,
        more: &[&str],
    ) -> Result<Host> {
        let more = [&["-name", "bench,debug-threads=on"], more].concat();
        self.start_behind(behind, folder, machine, "devices", &more)
    }

    /// Waits for the machine with more options, behind these words.
    pub(crate) fn receive_behind(
        &self,
        behind: &[&str],
        folder: &Path,
        machine: &GuestSpec,
        more: &[&str],
    ) -> Result<Host> {
        let more = [&["-incoming", "tcp:127.0.0.1:0"], more].concat();
        let mut host = self.start_behind(behind, folder, machine, "destination", &more)?;
        let mut qmp = control_of(&host)?;
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            let info = qmp.ask("query-migrate", json!({}))?;
            if let Some(port) = info["socket-address"][0]["port"].as_str() {
                host.address = Some(format!("tcp:127.0.0.1:{port}"));
                return Ok(host);
            }
            stop::sleep(Duration::from_millis(5))?;
        }
        bail!("QEMU does not listen: {}", host.process.complaints())
    }

    fn start_behind(
        &self,
        behind: &[&str],
        folder: &Path,
        machine: &GuestSpec,
        name: &str,
        more: &[&str],
    ) -> Result<Host> {
        let image = folder.join(format!("{name}.elf"));
        std::fs::write(&image, ELF).context("the guest's image")?;
        let control = folder.join(format!("{name}.qmp"));
        let mib = machine.mib;
        let words = [behind, &[PROGRAM]].concat();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities", "-machine", "pc,memory-backend=ram"])
            .args(["-m", &format!("{mib}M")])
            .args(["-object", &format!("memory-backend-memfd,id=ram,size={mib}M,share=on")])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&image)
            .args(["-append", &machine.workload.to_string()])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", control.display())])
            .args(more);
        if self.firmware {
            command.args(["-bios", FIRMWARE]);
        }
        Host::start(&mut command, machine, RAM, control)
    }
}

impl Subject for Qemu {
    fn name(&self) -> &str {
        if self.post_copy { "qemu-postcopy" } else { "qemu" }
    }

    fn run(&self, folder: &Path, machine: &GuestSpec) -> Result<Host> {
        self.start(folder, machine, "source", &[])
    }

    fn receive(&self, folder: &Path, machine: &GuestSpec) -> Result<Host> {
        self.receive_behind(&[], folder, machine, &[])
    }

    /// From the command to the later of: the source says that it is done, the destination says that the guest runs.
    /// Post-copy is begun at once, so that no page is sent before switchover.
    fn migrate(&self, source: &Host, destination: &Host, there: &mut dyn FnMut() -> Result<()>) -> Result<Migrated> {
        let uri = destination.address.as_deref().context("the destination does not listen")?;
        let (mut from, mut to) = (control_of(source)?, control_of(destination)?);
        from.ask("migrate-set-parameters", json!({ "max-bandwidth": UNLIMITED }))?;
        enable(&mut from, "events")?;
        if self.post_copy {
            enable(&mut from, "postcopy-ram")?;
            enable(&mut to, "postcopy-ram")?;
        }
        let swap_before = SwapCounters::read()?;
        let start = Instant::now();
        from.ask("migrate", json!({ "uri": uri }))?;
        if self.post_copy {
            from.ask("migrate-start-postcopy", json!({}))?;
        }
        let mut status = wait_for_status(&mut from, &["completed", "failed", "postcopy-active"])?;
        let mut running = None;
        if status != "failed" {
            to.wait_for(|event| (event["event"] == "RESUME").then_some(()))?;
            running = Some((start.elapsed(), SwapCounters::read()?.since(&swap_before).swap_ins));
        }
        if status == "postcopy-active" {
            there()?;
            status = wait_for_status(&mut from, &["completed", "failed", "postcopy-paused"])?;
        }
        let total = start.elapsed();
        let info: Value = from.ask("query-migrate", json!({}))?;
        let (Some((switchover, swap_ins_before_switchover)), "completed") = (running, status.as_str()) else {
            let why = format!("{info}; {}", destination.process.complaints().trim());
            if self.post_copy {
                return Err(Refused::new("post-copy", why).into());
            }
            bail!("the migration failed: {why}");
        };
        let downtime = info["downtime"].as_u64().context("QEMU does not tell the downtime")?;
        let post_copy = self.post_copy.then(|| Tail { time: total.saturating_sub(switchover), faults: None });
        let downtime = Duration::from_millis(downtime);
        Ok(Migrated { switchover, swap_ins_before_switchover, post_copy, total, downtime, helpers_cpu: Duration::ZERO })
    }
}

fn enable(qmp: &mut Qmp, capability: &str) -> Result<()> {
    let on = json!({ "capabilities": [{ "capability": capability, "state": true }] });
    qmp.ask("migrate-set-capabilities", on).map(|_| ())
}

/// Waits until a source says that its migration has come to one of these.
fn wait_for_status(qmp: &mut Qmp, wanted: &[&str]) -> Result<String> {
    qmp.wait_for(|event| {
        let status = event["data"]["status"].as_str().filter(|_| event["event"] == "MIGRATION")?;
        wanted.contains(&status).then(|| status.to_owned())
    })
}

fn control_of(host: &Host) -> Result<Qmp> {
    let path: &PathBuf = &host.control;
    Qmp::connect(path).with_context(|| host.process.complaints())
}
