//! How Linux guests end: by their own power-off, by the button, by a reboot that starts them anew.

use anyhow::{Result, bail, ensure};
use thermocline::control::client::ask;
use thermocline::control::{Answer, Request};
use thermocline_tests::linux::{LinuxMachine, Monitor};
use thermocline_tests::{Sandbox, Trials, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, LinuxGuest], the_power_button_switches_a_kernel_off);
    trial!(trials, [Kvm, LinuxGuest], a_reboot_ends_in_userspace_again);
}

fn the_power_button_switches_a_kernel_off() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let guest = LinuxMachine::bare(Monitor::Thermocline).boot(&sandbox, &["power-button"])?;
    guest.says("power-button", "waits")?;
    match ask(&guest.control, &Request::PowerButton {}, |_| {})? {
        Answer::Done => {}
        other => bail!("{other:?} to the power button"),
    }
    println!("power-button: {}", guest.passes("power-button")?);
    guest.powers_off()?;
    Ok(())
}

/// In the same process, from the same files; and with `--no-reboot` the process ends.
fn a_reboot_ends_in_userspace_again() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let bare = LinuxMachine::bare(Monitor::Thermocline);
    {
        let guest = bare.boot(&sandbox, &["cpus", "reboot"])?;
        guest.passes_again("cpus")?;
    }
    let sandbox = Sandbox::new()?;
    let guest = LinuxMachine { more: vec!["--no-reboot".into()], ..bare }.boot(&sandbox, &["cpus", "reboot"])?;
    guest.passes("cpus")?;
    let ended = guest.powers_off()?;
    let boots = guest.process.stdout.lines().iter().filter(|line| line.contains("Linux version")).count();
    ensure!(boots == 1, "it has booted {boots} times: {ended:?}");
    Ok(())
}
