//! `cargo xtask kvm`: a machine that others run for us, whose `/dev/kvm` is root's.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use command_line::Output;

use crate::host;
use crate::step::run;

/// Where udev looks for rules that an administrator has made.
const RULE_FILE: &str = "/etc/udev/rules.d/99-thermocline-kvm.rules";
/// Everybody may use it, now and when its module is loaded anew.
const RULE: &str = "KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0666\", OPTIONS+=\"static_node=kvm\"\n";

/// Lets every user open `/dev/kvm`.
///
/// # Errors
/// When there is no KVM, no udev, or this is nobody who may.
pub(crate) fn main() -> Result<()> {
    ensure!(host::has_kvm(), "there is no /dev/kvm on this machine");
    let mut tee = as_root("tee");
    let mut child = tee.arg(RULE_FILE).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().context("no tee")?;
    child.stdin.take().context("tee reads nothing")?.write_all(RULE.as_bytes())?;
    ensure!(child.wait()?.success(), "{RULE_FILE} cannot be written");
    run(as_root("udevadm").args(["control", "--reload-rules"]))?;
    run(as_root("udevadm").args(["trigger", "--name-match=kvm"]))?;
    run(as_root("udevadm").args(["settle"]))?;
    Output::default().line(format_args!("/dev/kvm is everybody's, by {RULE_FILE}"))?;
    Ok(())
}

fn as_root(name: &str) -> Command {
    if host::is_root() {
        return Command::new(name);
    }
    let mut sudo = Command::new("sudo");
    sudo.arg(name);
    sudo
}
