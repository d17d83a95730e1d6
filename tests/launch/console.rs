//! Where the serial port goes.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use rustix::termios::{LocalModes, Termios};
use thermocline::control::Request;
use thermocline_tests::console::eventually;
use thermocline_tests::process::{Output, Standard, TIMEOUT};
use thermocline_tests::terminal::Terminal;
use thermocline_tests::{GuestConsole, Process, Sandbox, Trials, Workload, trial};
use workload_guest::{Command, Line};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], standard_input_is_the_guests_input);
    trial!(trials, [Kvm], long_input_is_not_lost);
    trial!(trials, [Kvm], the_guest_goes_on_when_its_input_ends);
    trial!(trials, [Kvm], a_file_takes_the_console);
    trial!(trials, [Kvm], a_pseudo_terminal_works_both_ways);
    trial!(trials, [Kvm], the_terminal_is_put_back);
}

fn standard_input_is_the_guests_input() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot(&Workload::default())?;
    machine.console.tell(Command::Rate(500))?;
    machine.console.check(machine.workload.bytes())?;
    machine.console.must_run().map(drop)
}

/// More at once than the port's FIFO holds.
fn long_input_is_not_lost() -> Result<()> {
    const COMMANDS: usize = 100;
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot(&Workload::default())?;
    let from = machine.console.output().len();
    let many = vec!["reset-stall"; COMMANDS].join("\n");
    machine.console.type_line(&many)?;
    let mut acknowledged = 0;
    let all = machine.console.output().wait_for(from, TIMEOUT, |line| {
        acknowledged += usize::from(matches!(Line::parse(line), Ok(Line::Ack(ack)) if ack.command == "reset-stall"));
        (acknowledged == COMMANDS).then_some(())
    });
    all.with_context(|| format!("{acknowledged} of {COMMANDS} commands were understood")).map(drop)
}

fn the_guest_goes_on_when_its_input_ends() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let arguments: Vec<OsString> = Workload::default().arguments().into_iter().map(Into::into).collect();
    let command = [sandbox.command(&["run"])?, arguments].concat();
    let mut process = Process::start("machine", &command, Standard::Pipes)?;
    drop(process.stdin.take());
    let console = GuestConsole::new(process.stdout.clone(), None);
    console.ready()?;
    console.must_run().map(drop)
}

/// A machine whose console is not on its standard output.
fn elsewhere(sandbox: &Sandbox, serial: &str) -> Result<(Process, PathBuf)> {
    let api = sandbox.path("api.sock");
    let mut command = sandbox.command(&["run", "--serial", serial, "--api-socket"])?;
    command.push(api.clone().into());
    command.extend(Workload::default().arguments().into_iter().map(OsString::from));
    Ok((Process::start("machine", &command, Standard::Pipes)?, api))
}

fn a_file_takes_the_console() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let path = sandbox.path("console.log");
    let (process, api) = elsewhere(&sandbox, &format!("file={}", path.display()))?;
    let reports = || -> Result<usize> {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        Ok(text.lines().filter(|line| matches!(Line::parse(line), Ok(Line::Report(_)))).count())
    };
    eventually("three reports in the file", || Ok(reports()? >= 3))?;
    thermocline::control::client::ask(&api, &Request::Quit { force: false }, |_| {})?;
    ensure!(process.wait()?.code() == Some(0), "quit failed");
    ensure!(process.stdout.is_empty(), "standard output has something: {:?}", process.stdout.lines());
    Ok(())
}

fn a_pseudo_terminal_works_both_ways() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (process, _) = elsewhere(&sandbox, "pty")?;
    let announced = |line: &str| line.strip_prefix("thermocline: serial console on ").map(PathBuf::from);
    let (_, path) = process.stderr.wait_for(0, TIMEOUT, announced).context("the pseudo-terminal is not announced")?;
    let open = || File::options().read(true).write(true).open::<&Path>(&path);
    let mut console = GuestConsole::new(Output::collect(open()?), Some(Box::new(open()?)));
    console.report()?;
    console.tell(Command::Rate(100))?;
    console.check(Workload::default().bytes())?;
    process.signal(Signal::INT)?;
    process.wait()?.sentence(130).map(drop)
}

/// What of a terminal's settings can be compared.
fn comparable(settings: &Termios) -> impl PartialEq + std::fmt::Debug {
    let Termios { input_modes, output_modes, control_modes, local_modes, .. } = settings;
    (*input_modes, *output_modes, *control_modes, *local_modes)
}

fn the_terminal_is_put_back() -> Result<()> {
    for (signal, command) in [(Some(Signal::INT), ""), (Some(Signal::TERM), ""), (None, "off\n"), (None, "crash\n")] {
        let sandbox = Sandbox::new()?;
        let mut terminal = Terminal::new()?;
        let before = terminal.settings()?;
        ensure!(before.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO), "an odd terminal");
        let mut arguments = sandbox.command(&["run"])?;
        arguments.extend(Workload::default().arguments().into_iter().map(OsString::from));
        let process = Process::start("machine", &arguments, Standard::Terminal(terminal.for_program()?))?;
        let console = GuestConsole::new(Output::collect(terminal.person.try_clone()?), None);
        console.ready()?;
        let during = terminal.settings()?;
        ensure!(!during.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO), "characters are not passed on");
        match signal {
            Some(signal) => process.signal(signal)?,
            None => terminal.person.write_all(command.as_bytes())?,
        }
        process.wait_within(TIMEOUT + Duration::from_secs(1))?;
        let after = terminal.settings()?;
        ensure!(
            comparable(&before) == comparable(&after),
            "after {signal:?} {command:?}: {:?} instead of {:?}",
            comparable(&after),
            comparable(&before)
        );
    }
    Ok(())
}
