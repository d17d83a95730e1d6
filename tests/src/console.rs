//! The guest's console: what it says, read as [`Line`]s, and commands to it.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use workload_guest::report::{CheckedAll, Ready, Report};
use workload_guest::{Command, Line};

use crate::process::{Output, TIMEOUT};

/// A guest that works reports ten times a second; one that does not for so long stands.
const SILENT_IF_STANDING: Duration = Duration::from_millis(400);
/// What the guest said before it stopped has been read by then.
const READ_BY_THEN: Duration = Duration::from_millis(60);

/// The other end of a serial port.
pub struct GuestConsole {
    output: Output,
    input: Option<Box<dyn Write + Send>>,
}

impl std::fmt::Debug for GuestConsole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestConsole").field("lines", &self.output.len()).finish_non_exhaustive()
    }
}

impl GuestConsole {
    /// A console that is heard at `output` and typed at `input`.
    pub fn new(output: Output, input: Option<Box<dyn Write + Send>>) -> Self {
        Self { output, input }
    }

    /// All that was said.
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// Types a command and waits until the guest says that it has understood.
    ///
    /// # Errors
    /// When it does not.
    pub fn tell(&mut self, command: Command) -> Result<()> {
        let from = self.output.len();
        self.type_line(&command.to_string())?;
        self.find(from, |line| matches!(line, Line::Ack(ack) if ack.command == command.to_string()).then_some(()))
            .with_context(|| format!("the guest did not acknowledge '{command}'"))
    }

    /// Types a command for a device; the first line behind it that `answer` takes.
    ///
    /// # Errors
    /// When the guest refuses it, or none comes.
    pub fn device<T>(&mut self, command: &str, answer: impl Fn(Line) -> Option<T>) -> Result<T> {
        let from = self.output.len();
        self.type_line(command)?;
        let answered = self.find(from, |line| match line {
            Line::Error(error) => Some(Err(error.message)),
            line => answer(line).map(Ok),
        });
        match answered.with_context(|| format!("no answer to '{command}'"))? {
            Ok(answer) => Ok(answer),
            Err(why) => bail!("the guest refuses '{command}': {why}"),
        }
    }

    /// Types a line.
    ///
    /// # Errors
    /// When there is no input.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("this console has no input")?;
        writeln!(input, "{line}").context("the console takes no input")?;
        Ok(input.flush()?)
    }

    /// Waits until the guest has written all its pages.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn ready(&self) -> Result<Ready> {
        self.find(0, |line| if let Line::Ready(ready) = line { Some(ready) } else { None }).context("no 'ready'")
    }

    /// Has the guest reset its machine, and waits until it has written all its pages anew.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn reset(&mut self) -> Result<Ready> {
        let from = self.output.len();
        self.type_line("reset")?;
        self.find(from, |line| if let Line::Ready(ready) = line { Some(ready) } else { None })
            .context("no 'ready' after a reset")
    }

    /// The next report, from now on.
    ///
    /// # Errors
    /// When none comes.
    pub fn report(&self) -> Result<Report> {
        self.find(self.output.len(), |line| if let Line::Report(report) = line { Some(report) } else { None })
            .context("no report")
    }

    /// The next line, from now on, that `wanted` takes.
    ///
    /// # Errors
    /// When none comes.
    pub fn next<T>(&self, wanted: impl Fn(Line) -> Option<T>) -> Result<T> {
        self.find(self.output.len(), wanted)
    }

    /// Has the guest compare every page it has written, and checks that none has lost its contents, now or before.
    ///
    /// # Errors
    /// When one has, or the guest does not answer.
    pub fn check(&mut self, workload_bytes: u64) -> Result<CheckedAll> {
        let from = self.output.len();
        self.tell(Command::Check)?;
        let all = self
            .find(from, |line| if let Line::CheckedAll(all) = line { Some(all) } else { None })
            .context("no answer to 'check'")?;
        ensure!(all.errors == 0, "{} of {} pages have lost their contents", all.errors, all.pages);
        ensure!(all.pages == workload_bytes / 4096, "{} pages checked of {}", all.pages, workload_bytes / 4096);
        let report = self.report()?;
        ensure!(report.errors == 0, "{} pages had lost their contents", report.errors);
        Ok(all)
    }

    /// Checks that the guest runs now: it says more and has done more.
    ///
    /// # Errors
    /// When it stands.
    pub fn must_run(&self) -> Result<Report> {
        let first = self.report().context("the guest is paused")?;
        let second = self.report().context("the guest is paused")?;
        ensure!(second.iterations > first.iterations, "the guest runs and does no work: {first:?} {second:?}");
        ensure!(second.errors == 0, "{} pages have lost their contents", second.errors);
        Ok(second)
    }

    /// Checks that the guest is paused now.
    ///
    /// # Errors
    /// When it says something.
    pub fn must_be_paused(&self) -> Result<()> {
        std::thread::sleep(READ_BY_THEN);
        let before = self.output.len();
        std::thread::sleep(SILENT_IF_STANDING);
        let after = self.output.len();
        ensure!(before == after, "the guest runs: {:?}", self.output.lines().get(before..after));
        Ok(())
    }

    /// Checks that no guest ever said anything here.
    ///
    /// # Errors
    /// When one did.
    pub fn must_be_silent(&self) -> Result<()> {
        let (lines, rest) = (self.output.lines(), self.output.rest());
        ensure!(lines.is_empty() && rest.is_empty(), "a guest ran here: {lines:?} {rest:?}");
        Ok(())
    }

    /// The first line from number `from` on that `wanted` takes. A line that was cut when the guest moved is passed
    /// over; a guest that panics or loses a page's contents ends the search.
    fn find<T>(&self, from: usize, wanted: impl Fn(Line) -> Option<T>) -> Result<T> {
        let found = self.output.wait_for(from, TIMEOUT, |text| match Line::parse(text) {
            Ok(line @ (Line::Panic(_) | Line::Bad(_))) => Some(Err(line)),
            Ok(line) => wanted(line).map(Ok),
            Err(_) => None,
        });
        match found?.1 {
            Ok(found) => Ok(found),
            Err(line) => bail!("{line:?}"),
        }
    }
}

/// Checks that a guest that moved said every byte on one of the two consoles, and none on both: every line is whole,
/// once the head that was said at the first is put before the tail that was said at the second.
///
/// # Errors
/// When something is missing or there twice.
pub fn must_continue(first: &Output, second: &Output) -> Result<()> {
    ensure!(first.wait_closed(TIMEOUT), "the first console is still open");
    second.wait_for(0, TIMEOUT, |_| Some(()))?;
    let mut lines = first.lines();
    if lines.first().is_some_and(|line| Line::parse(line).is_err()) {
        // The tail of what was said before the guest came to the first.
        lines.remove(0);
    }
    let mut behind = second.lines().into_iter();
    lines.push(first.rest() + &behind.next().unwrap_or_default());
    lines.extend(behind);
    let mut last = None;
    for line in lines {
        match Line::parse(&line) {
            Ok(Line::Report(report)) => {
                ensure!(last.is_none_or(|last| last <= report.iterations), "work was undone before {line:?}");
                last = Some(report.iterations);
            }
            Ok(_) => {}
            Err(e) => bail!("the console has lost or repeated bytes: {line:?}: {e}"),
        }
    }
    Ok(())
}

/// Waits until `done` says so.
///
/// # Errors
/// When it does not within [`TIMEOUT`].
pub fn eventually(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !done()? {
        ensure!(Instant::now() < deadline, "{what}: not within {TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
