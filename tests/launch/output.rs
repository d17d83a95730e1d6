//! Standard output whose reader has gone, as behind `| head -1`: no panic, no complaint, and what was asked for is done.

use anyhow::{Context, Result, ensure};
use thermocline_tests::agent::start_on;
use thermocline_tests::owner::destination_only;
use thermocline_tests::process::{Ended, Process, Standard};
use thermocline_tests::{Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], whoever_only_prints_ends_with_its_reader);
    trial!(trials, [Kvm], a_migration_goes_on_without_anybody_who_reads_its_progress);
    trial!(trials, [], help_and_version_need_no_reader);
}

fn must_be_content(what: &str, ended: &Ended) -> Result<()> {
    ensure!(ended.code() == Some(0) && ended.stderr.is_empty(), "{what} without a reader: {ended:?}");
    Ok(())
}

fn whoever_only_prints_ends_with_its_reader() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let machine = sandbox.boot(&Workload::default())?;
    let api = machine.api.to_string_lossy();
    for arguments in [
        &["pages", "--api-socket", &api][..],
        &["pages", "--json", "--api-socket", &api],
        &["ctl", "--api-socket", &api, "status"],
        &["ctl", "--api-socket", &api, "metrics"],
        &["doctor"],
        &["doctor", "--json"],
    ] {
        let process = Process::start(arguments[0], &sandbox.command(arguments)?, Standard::NoReader)?;
        must_be_content(&arguments.join(" "), &process.wait()?)?;
    }
    for words in [&["map"][..], &["map", "--json"], &["watch"], &["daemon"], &["scan", "hash"], &["scan", "zero"]] {
        let ended = start_on(Standard::NoReader, words, machine.process.pid(), &[])?.wait()?;
        must_be_content(&format!("memory-agent {}", words.join(" ")), &ended)?;
    }
    Ok(())
}

fn a_migration_goes_on_without_anybody_who_reads_its_progress() -> Result<()> {
    for json in [true, false] {
        let sandbox = Sandbox::new()?;
        let workload = Workload::default();
        let source = sandbox.boot(&workload)?;
        let mut destination = sandbox.receive(&workload)?;
        let api = source.api.to_string_lossy();
        let mut arguments = vec!["migrate", "--api-socket", &api, "--to", &destination.address];
        arguments.extend(json.then_some("--json"));
        let process = Process::start("migrate", &sandbox.command(&arguments)?, Standard::NoReader)?;
        let ended = process.wait()?;
        ensure!(ended.code() == Some(0), "the migration failed without a reader: {ended:?}");
        ensure!(!ended.stderr.iter().any(|line| line.contains("panicked")), "{ended:?}");
        destination_only(&source, &mut destination.machine).context("the guest has not moved")?;
    }
    Ok(())
}

fn help_and_version_need_no_reader() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for argument in ["--help", "--version"] {
        let process = Process::start(argument, &sandbox.command(&[argument])?, Standard::NoReader)?;
        must_be_content(argument, &process.wait()?)?;
    }
    Ok(())
}
