//! The guest's console: what it says, and commands to it.

use std::io::Write;
use std::process::ChildStdin;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use workload_guest::report::{CheckedAll, Ready, Report, Touched};
use workload_guest::{Command, Line};

use crate::lines::{Lines, Said};
use crate::process::TIMEOUT;

/// Both ends of the guest's serial port.
#[derive(Debug)]
pub(crate) struct GuestConsole {
    input: ChildStdin,
    lines: Lines,
}

/// What the guest has seen for a while.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    /// The longest time a vCPU did not run, microseconds, since `reset-stall`.
    pub(crate) longest_stall_us: u64,
    /// Pages that were not as written, since boot.
    pub(crate) errors: u64,
}

impl GuestConsole {
    /// A console with these ends.
    pub(crate) fn new(input: ChildStdin, lines: Lines) -> Self {
        Self { input, lines }
    }

    /// Waits for the guest's first line, and tells when it came.
    pub(crate) fn ready(&self) -> Result<(Instant, Ready)> {
        self.wait(|said, line| if let Line::Ready(ready) = line { Some((said.at, ready)) } else { None })
    }

    /// Sends a command and waits until the guest has understood it.
    pub(crate) fn send(&self, command: Command) -> Result<()> {
        writeln!(&self.input, "{command}").context("the guest's console is closed")?;
        let text = command.to_string();
        self.wait(|_, line| matches!(line, Line::Ack(ack) if ack.command == text).then_some(()))
    }

    /// Passes over what was said so far, and takes in reports for this long, but one at least.
    pub(crate) fn watch(&self, duration: Duration) -> Result<Seen> {
        self.lines.drain().for_each(drop);
        let until = Instant::now() + duration;
        let mut seen = Seen::default();
        loop {
            let report: Report =
                self.wait(|_, line| if let Line::Report(report) = line { Some(report) } else { None })?;
            seen.longest_stall_us = seen.longest_stall_us.max(report.longest_stall_us);
            seen.errors = seen.errors.max(report.errors);
            if Instant::now() >= until {
                return Ok(seen);
            }
        }
    }

    /// Has the guest compare every page that it has written.
    pub(crate) fn check(&self) -> Result<CheckedAll> {
        self.send(Command::Check)?;
        self.wait(|_, line| if let Line::CheckedAll(all) = line { Some(all) } else { None })
    }

    /// Has the guest read and compare this many cold pages, chosen at random.
    pub(crate) fn touch_cold(&self, pages: u64) -> Result<Touched> {
        self.send(Command::TouchCold(pages))?;
        self.wait(|_, line| if let Line::Touched(touched) = line { Some(touched) } else { None })
    }

    /// Has a device do something; `answer` takes the line that tells what came of it, and `begun` is called when the guest
    /// has understood.
    pub(crate) fn device<T>(
        &self,
        command: Command,
        begun: impl FnOnce() -> Result<()>,
        answer: impl Fn(Line) -> Option<T>,
    ) -> Result<T> {
        self.send(command)?;
        begun()?;
        self.wait(|_, line| answer(line))
    }

    /// The next line that `wanted` takes. Lines that are none are passed over: firmware's, and the one that was cut in
    /// two when the guest moved.
    fn wait<T>(&self, mut wanted: impl FnMut(&Said, Line) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let said = self.lines.next(TIMEOUT)?.context("the machine has ended")?;
            match Line::parse(&said.text) {
                Ok(line @ (Line::Panic(_) | Line::Error(_) | Line::Bad(_) | Line::BadBlock(_))) => {
                    bail!("the guest says {line:?}")
                }
                Ok(line) => {
                    if let Some(found) = wanted(&said, line) {
                        return Ok(found);
                    }
                }
                Err(_) => {}
            }
            ensure!(Instant::now() < deadline, "the guest did not say what it should within {TIMEOUT:?}");
        }
    }
}
