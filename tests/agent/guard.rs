//! Keeping memory as it is while others read it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use memory_agent::GuardReport;
use rustix::process::Signal;
use serde_json::Value;
use thermocline_tests::agent::{ColdGuest, fails, guarding, prints, run, sentence, start};
use thermocline_tests::process::Process;
use thermocline_tests::residency::must_be_near;
use thermocline_tests::swap::undisturbed;
use thermocline_tests::{Sandbox, Trials, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Zram], who_reads_by_the_file_swaps_nothing_in_for_long);
    trial!(trials, [Kvm, Root, Zram], who_reads_through_the_process_swaps_nothing_in_for_long);
    trial!(trials, [Kvm, Root, Zram], a_command_that_reads_is_guarded_and_its_code_is_told);
    trial!(trials, [Kvm, Root, Zram], a_map_from_elsewhere_is_restored);
    trial!(trials, [Kvm, Root, Zram], the_end_of_the_process_is_an_end);
}

/// Ends a guard that has nothing else to do; what it did.
fn end(guard: &Process) -> Result<GuardReport> {
    guard.signal(Signal::INT)?;
    let ended = guard.wait()?;
    ensure!(ended.code() == Some(0) && ended.stderr.len() == 1, "{ended:?}");
    Ok(serde_json::from_str(&guard.stdout.lines().concat())?)
}

/// All that was swapped was read, and is swapped again.
fn must_have_restored(guest: &ColdGuest, report: &GuardReport) -> Result<()> {
    ensure!(report.snapshot == guest.before, "{report:?} of {:?}", guest.before);
    ensure!(report.brought_in >= guest.before.swapped / 100 * 99, "the reader brought nothing in: {report:?}");
    must_be_near("restored", report.restored, report.brought_in, 1)?;
    guest.must_be_as_before()
}

fn who_reads_by_the_file_swaps_nothing_in_for_long() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let guard = start(&["guard"], guest.pid(), &["--window", "4MiB", "--json"])?;
        let swapped = guarding(&guard, guest.pid())?;
        ensure!(swapped == guest.before.swapped, "{swapped} of {:?}", guest.before);
        guest.read()?;
        must_have_restored(&guest, &end(&guard)?)
    })
}

fn who_reads_through_the_process_swaps_nothing_in_for_long() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let map: Value = serde_json::from_str(&prints(&["map"], guest.pid(), &["--json"])?.concat())?;
        let address = map["memories"][0]["address"].as_u64().context("an address")?;
        let guard = start(&["guard"], guest.pid(), &["--json"])?;
        guarding(&guard, guest.pid())?;
        // Holes are allocated by this, and are to be holes again.
        let memory = File::open(format!("/proc/{}/mem", guest.pid()))?;
        let mut bytes = vec![0; 1 << 20];
        for megabyte in 0..guest.pages() >> 8 {
            memory.read_exact_at(&mut bytes, address + (megabyte << 20))?;
        }
        must_have_restored(&guest, &end(&guard)?)
    })
}

fn a_command_that_reads_is_guarded_and_its_code_is_told() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let script = format!("cat {} | wc -c; exit 7", guest.memory_path()?.display());
        let (ended, lines) = run(&["guard"], guest.pid(), &["--json", "--", "sh", "-c", &script])?;
        ensure!(ended.code() == Some(7), "{ended:?}");
        // Standard output is the command's alone.
        ensure!(lines == [(guest.pages() * 4096).to_string()], "{lines:?}");
        let report = ended.stderr.iter().find_map(|line| serde_json::from_str(line).ok());
        must_have_restored(&guest, &report.with_context(|| format!("no report: {ended:?}"))?)?;

        let (ended, _) = run(&["guard"], guest.pid(), &["--", "sh", "-c", "kill -9 $$"])?;
        ensure!(ended.code() == Some(137), "{ended:?}");
        let (ended, _) = run(&["guard"], guest.pid(), &["--", "true"])?;
        ensure!(ended.code() == Some(0), "{ended:?}");
        let said = fails(127, &["guard"], guest.pid(), &["--", "/no/such/command"])?;
        ensure!(said.contains("/no/such/command"), "{said}");

        // SIGTERM is for the command as well, and all ends as usual.
        let guard = start(&["guard"], guest.pid(), &["--", "sleep", "60"])?;
        guarding(&guard, guest.pid())?;
        guard.signal(Signal::TERM)?;
        ensure!(guard.wait()?.code() == Some(143), "SIGTERM does not reach the command");
        Ok(())
    })
}

fn a_map_from_elsewhere_is_restored() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let map = sandbox.path("map.json");
        let path = map.to_str().context("a path")?;
        std::fs::write(&map, prints(&["map"], guest.pid(), &["--json"])?.concat())?;
        // All is in memory, as after a migration that knows nothing of this.
        guest.read()?;
        must_be_near("swapped", guest.truth()?.counts().swapped, 0, 1)?;
        let guard = start(&["guard"], guest.pid(), &["--like", path, "--json"])?;
        ensure!(guarding(&guard, guest.pid())? == guest.before.swapped, "it says another number");
        must_have_restored(&guest, &end(&guard)?)?;

        let mut other: Value = serde_json::from_str(&std::fs::read_to_string(&map)?)?;
        other["memories"][0]["runs"] = serde_json::json!([[10, "swapped"]]);
        other["memories"][0]["pages"] = 10.into();
        std::fs::write(&map, other.to_string())?;
        let said = fails(2, &["guard"], guest.pid(), &["--like", path])?;
        ensure!(said.contains("10 pages") && said.contains(&guest.pages().to_string()), "{said}");
        std::fs::write(&map, "{}")?;
        let said = fails(2, &["guard"], guest.pid(), &["--like", path])?;
        ensure!(said.contains(path), "{said}");
        Ok(())
    })
}

fn the_end_of_the_process_is_an_end() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let guest = ColdGuest::new(&sandbox)?;
    let guard = start(&["guard"], guest.pid(), &[])?;
    guarding(&guard, guest.pid())?;
    let script = format!("kill -9 {}; sleep 0.3; exit 5", guest.pid());
    let (ended, _) = run(&["guard"], guest.pid(), &["--", "sh", "-c", &script])?;
    ensure!(ended.code() == Some(5), "{ended:?}");
    ensure!(ended.stderr.iter().any(|line| line.contains("has ended")), "{ended:?}");
    let said = sentence(&guard.wait()?, 0)?;
    ensure!(said == format!("process {} has ended", guest.pid()), "{said}");
    Ok(())
}
