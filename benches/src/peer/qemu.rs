//! Stock QEMU on KVM, with guest RAM on a shared memfd, as Thermocline has it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use workload_guest::ELF;

use super::qmp::Qmp;
use crate::process::PATIENCE;
use crate::stop;
use crate::subject::{Host, Machine, Migrated, Subject};

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
        Ok(Self { version, firmware })
    }

    /// What it says of itself.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    fn start(&self, folder: &Path, machine: &Machine, name: &str, more: &[&str]) -> Result<Host> {
        let image = folder.join(format!("{name}.elf"));
        std::fs::write(&image, ELF).context("the guest's image")?;
        let control = folder.join(format!("{name}.qmp"));
        let mib = machine.mib;
        let mut command = Command::new(PROGRAM);
        command
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
        "qemu"
    }

    fn run(&self, folder: &Path, machine: &Machine) -> Result<Host> {
        self.start(folder, machine, "source", &[])
    }

    fn receive(&self, folder: &Path, machine: &Machine) -> Result<Host> {
        let mut host = self.start(folder, machine, "destination", &["-incoming", "tcp:127.0.0.1:0"])?;
        let mut qmp = control_of(&host)?;
        let deadline = Instant::now() + PATIENCE;
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

    /// From the command to the later of: the source says that it is done, the destination says that the guest runs.
    fn migrate(&self, source: &Host, destination: &Host) -> Result<Migrated> {
        let uri = destination.address.as_deref().context("the destination does not listen")?;
        let (mut from, mut to) = (control_of(source)?, control_of(destination)?);
        from.ask("migrate-set-parameters", json!({ "max-bandwidth": UNLIMITED }))?;
        from.ask("migrate-set-capabilities", json!({ "capabilities": [{ "capability": "events", "state": true }] }))?;
        let start = Instant::now();
        from.ask("migrate", json!({ "uri": uri }))?;
        let status = from.wait_for(|event| match (event["event"].as_str(), event["data"]["status"].as_str()) {
            (Some("MIGRATION"), Some(status @ ("completed" | "failed"))) => Some(status.to_owned()),
            _ => None,
        })?;
        if status == "completed" {
            to.wait_for(|event| (event["event"] == "RESUME").then_some(()))?;
        }
        let total = start.elapsed();
        let info: Value = from.ask("query-migrate", json!({}))?;
        if status != "completed" {
            bail!("the migration failed: {info}; {}", destination.process.complaints().trim());
        }
        let downtime = info["downtime"].as_u64().context("QEMU does not tell the downtime")?;
        Ok(Migrated { total, downtime: Duration::from_millis(downtime), helpers_cpu: Duration::ZERO })
    }
}

fn control_of(host: &Host) -> Result<Qmp> {
    let path: &PathBuf = &host.control;
    Qmp::connect(path).with_context(|| host.process.complaints())
}
