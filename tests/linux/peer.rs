//! What the same files do on QEMU: without it nobody could tell a fault of the guest's from one of ours.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use anyhow::{Result, anyhow, ensure};
use harness::host_tap::HostTap;
use thermocline_tests::linux::{LinuxGuest, LinuxMachine, Monitor};
use thermocline_tests::{Sandbox, Trials, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, LinuxGuest, Qemu, Root, Tap], the_same_files_work_on_qemu);
}

fn the_same_files_work_on_qemu() -> Result<()> {
    println!("the kernel complains of {:?}", complaints()?);
    Ok(())
}

/// Checks that the kernel has complained of nothing that it does not complain of on QEMU too.
///
/// # Errors
/// When it has, or QEMU cannot run it.
pub(crate) fn complains_no_more_than_on_qemu(guest: &LinuxGuest) -> Result<()> {
    let errors = guest.errors()?;
    let there = complaints()?;
    let ours: Vec<_> = errors.iter().filter(|line| !there.contains(&without_numbers(line))).collect();
    ensure!(ours.is_empty(), "the kernel complains of {ours:?}, which it does not on QEMU");
    Ok(())
}

/// What the kernel complains of on QEMU, with every device; found out once.
fn complaints() -> Result<&'static BTreeSet<String>> {
    static FOUND: OnceLock<Result<BTreeSet<String>, String>> = OnceLock::new();
    FOUND.get_or_init(|| find().map_err(|e| format!("{e:#}"))).as_ref().map_err(|why| anyhow!("on QEMU: {why}"))
}

fn find() -> Result<BTreeSet<String>> {
    let sandbox = Sandbox::new()?;
    let tap = HostTap::new("172.31.7.1/24")?;
    let machine = LinuxMachine::full(Monitor::Qemu, tap.name(), "172.31.7.2/24");
    let checks = ["cpus", "disk", "rng", "ping:172.31.7.1", "memory:128", "dmesg", "poweroff"];
    let guest = machine.boot(&sandbox, &checks)?;
    for check in ["cpus", "disk", "rng", "ping", "memory"] {
        println!("{check}: {}", guest.passes(check)?);
    }
    let errors = guest.errors()?;
    guest.powers_off()?;
    Ok(errors.iter().map(|line| without_numbers(line)).collect())
}

/// A message without addresses and times, which differ from boot to boot.
fn without_numbers(message: &str) -> String {
    message.chars().filter(|character| !character.is_ascii_digit()).collect()
}
