//! The distribution's own drivers, on our devices.

use anyhow::{Result, bail, ensure};
use harness::host_tap::HostTap;
use linux_guest::value;
use thermocline::control::client::ask;
use thermocline::control::{Answer, Request};
use thermocline_tests::console::eventually;
use thermocline_tests::linux::{LinuxGuest, LinuxMachine, Monitor};
use thermocline_tests::{Sandbox, Trials, trial};

use crate::peer::complains_no_more_than_on_qemu;

/// How much the guest fills and frees, MiB, and the pages of that.
const FREED_MIB: u64 = 200;
const FREED_PAGES: u64 = FREED_MIB << 20 >> 12;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, LinuxGuest, Qemu, Root, Tap], a_stock_kernel_uses_every_device);
}

fn a_stock_kernel_uses_every_device() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let tap = HostTap::new("172.31.8.1/24")?;
    let machine = LinuxMachine::full(Monitor::Thermocline, tap.name(), "172.31.8.2/24");
    let memory = format!("memory:{FREED_MIB}+2");
    let mut guest = machine.boot(&sandbox, &["cpus", "rng", "disk", "ping:172.31.8.1", &memory, "dmesg", "console"])?;
    println!("cpus: {}", guest.passes("cpus")?);
    let rng = guest.passes("rng")?;
    println!("rng: {rng}");
    ensure!(value(&rng, "source").is_some_and(|source| source.starts_with("virtio_rng")), "{rng}");
    println!("disk: {}", guest.passes("disk")?);
    println!("ping: {}", guest.passes("ping")?);
    frees_memory(&guest)?;
    complains_no_more_than_on_qemu(&guest)?;
    guest.type_line("poweroff")?;
    guest.powers_off()?;
    Ok(())
}

/// What the guest frees is free on the host.
fn frees_memory(guest: &LinuxGuest) -> Result<()> {
    guest.says("memory", "filled")?;
    let filled = holes(guest)?;
    guest.passes("memory")?;
    // A block of free pages is told of when it has been free for two seconds (mm/page_reporting.c).
    eventually("holes where the guest has freed memory", || {
        Ok(holes(guest)?.saturating_sub(filled) >= FREED_PAGES * 9 / 10)
    })?;
    println!("memory: {filled} holes while {FREED_PAGES} pages were filled, {} after they were freed", holes(guest)?);
    Ok(())
}

/// Pages of guest RAM that the host has given nothing for.
fn holes(guest: &LinuxGuest) -> Result<u64> {
    match ask(&guest.control, &Request::Pages { cells: 0, from_agent: false }, |_| {})? {
        Answer::Pages(pages) => Ok(pages.counts.hole),
        other => bail!("{other:?} to pages"),
    }
}
