//! A process: what it says, signals to it, and its end. Killed when dropped.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::stop::{self, SharedChild, locked};

/// Whether these tests were compiled for a machine whose processor is emulated, where everything takes many times longer.
pub const EMULATED: bool = option_env!("THERMOCLINE_TESTS_EMULATED").is_some();

/// How many times longer everything may take.
pub(crate) const SLOWER: u64 = if EMULATED { 6 } else { 1 };

/// Longer than anything takes that is not wrong.
pub const TIMEOUT: Duration = Duration::from_secs(20 * SLOWER);
/// Between two looks at something that cannot be waited for.
const LOOK: Duration = Duration::from_millis(2);
/// Lines of each process that a failure shows.
const SHOWN: usize = 8;
/// Outputs that a failure shows.
const PROCESSES: usize = 8;

/// What a process has written to one of its outputs.
#[derive(Clone, Debug, Default)]
pub struct Output(Arc<Written>);

#[derive(Debug, Default)]
struct Written {
    text: Mutex<Text>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Text {
    /// Whole lines, without their ends.
    lines: Vec<String>,
    /// What came after the last line end.
    rest: String,
    closed: bool,
}

impl Output {
    /// What goes elsewhere: nothing comes here.
    fn closed() -> Self {
        let output = Self::default();
        locked(&output.0.text).closed = true;
        output
    }

    /// Collects what `from` gives until it ends.
    pub fn collect(from: impl Read + Send + 'static) -> Self {
        let output = Self::default();
        let written = Arc::clone(&output.0);
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line);
                let mut now = locked(&written.text);
                match text.strip_suffix('\n') {
                    Some(whole) => now.lines.push(whole.trim_end_matches('\r').to_owned()),
                    None => now.rest = text.into_owned(),
                }
                line.clear();
                written.more.notify_all();
            }
            locked(&written.text).closed = true;
            written.more.notify_all();
        });
        output
    }

    /// Number of whole lines so far.
    pub fn len(&self) -> usize {
        locked(&self.0.text).lines.len()
    }

    /// Whether there is no whole line yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All whole lines so far.
    pub fn lines(&self) -> Vec<String> {
        locked(&self.0.text).lines.clone()
    }

    /// What came after the last line end, once the output has ended.
    pub fn rest(&self) -> String {
        locked(&self.0.text).rest.clone()
    }

    /// Waits until nothing more can come.
    pub fn wait_closed(&self, limit: Duration) -> bool {
        let text = locked(&self.0.text);
        let waited = self.0.more.wait_timeout_while(text, limit, |text| !text.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    /// The first line at or behind `from` that `wanted` takes, and its number.
    ///
    /// # Errors
    /// When none comes within `limit`, or can come.
    pub fn wait_for<T>(
        &self,
        from: usize,
        limit: Duration,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<(usize, T)> {
        let deadline = Instant::now() + limit;
        let mut at = from;
        let mut text = locked(&self.0.text);
        loop {
            while let Some(line) = text.lines.get(at) {
                if let Some(found) = wanted(line) {
                    return Ok((at, found));
                }
                at += 1;
            }
            ensure!(!text.closed, "the output has ended");
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "nothing like it came within {limit:?}");
            text = self.0.more.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What the processes of the trial that runs have said, for when it fails.
static TRANSCRIPTS: Mutex<Vec<(String, Output)>> = Mutex::new(Vec::new());

pub(crate) fn forget_transcripts() {
    locked(&TRANSCRIPTS).clear();
}

pub(crate) fn transcripts() -> String {
    let mut all = String::new();
    let transcripts = locked(&TRANSCRIPTS);
    // What was over long ago does not matter.
    let spoken: Vec<_> = transcripts.iter().filter(|(_, output)| !output.is_empty()).collect();
    for (name, output) in &spoken[spoken.len().saturating_sub(PROCESSES)..] {
        let lines = output.lines();
        for line in &lines[lines.len().saturating_sub(SHOWN)..] {
            let cut = line.char_indices().nth(200).map_or(line.len(), |(at, _)| at);
            all += &format!("    {name}: {}\n", &line[..cut]);
        }
    }
    all
}

/// How a process ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// What it wrote to standard error.
    pub stderr: Vec<String>,
}

impl Ended {
    /// The code it exited with, if no signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Checks that it failed with this code and one clear line, and gives the line.
    ///
    /// # Errors
    /// When it did not.
    pub fn sentence(&self, code: i32) -> Result<&str> {
        ensure!(self.code() == Some(code), "ended with {} instead of code {code}: {:?}", self.status, self.stderr);
        // What a machine that waits for a guest or has a terminal says at its start is no complaint.
        let said = |line: &&String| {
            !line.starts_with("thermocline: waiting for a guest on ")
                && !line.starts_with("thermocline: serial console on ")
        };
        let lines: Vec<_> = self.stderr.iter().filter(said).collect();
        let [line] = lines.as_slice() else { bail!("not one line with code {code} but {lines:?}") };
        let sentence = line.strip_prefix("thermocline: ").with_context(|| format!("nameless: {line:?}"))?;
        ensure!(sentence.split_whitespace().count() >= 3, "no sentence: {line:?}");
        for noise in ["panicked", "RUST_BACKTRACE", "Os {", "Error {", "Some(", "kind:"] {
            ensure!(!line.contains(noise), "not for people: {line:?}");
        }
        Ok(sentence)
    }
}

/// A child process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: SharedChild,
    pid: u32,
    /// Standard input, if it is a pipe.
    pub stdin: Option<ChildStdin>,
    /// Standard output, if it is a pipe.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
}

/// Where a process's standard input and output go.
#[derive(Debug, Default)]
pub enum Standard {
    /// Pipes to and from us.
    #[default]
    Pipes,
    /// This terminal for all three.
    Terminal(OwnedFd),
    /// No input, and an output that nobody reads: a pipe whose other end is closed.
    NoReader,
}

impl Process {
    /// Starts `program`; `name` is how failures call it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, command: &[OsString], standard: Standard) -> Result<Self> {
        let [program, arguments @ ..] = command else { bail!("no program") };
        let mut command = Command::new(program);
        command.args(arguments).env_remove("THERMOCLINE_LOG").env_remove("RUST_LOG");
        match standard {
            Standard::Pipes => {
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            Standard::Terminal(terminal) => {
                let again = || terminal.try_clone().context("the terminal cannot be shared");
                command.stdin(again()?).stdout(again()?).stderr(Stdio::piped());
            }
            Standard::NoReader => {
                let (reader, writer) = std::io::pipe().context("no pipe")?;
                drop(reader);
                command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
            }
        }
        let mut child: Child = command.spawn().with_context(|| format!("{} cannot be started", program.display()))?;
        let stdout = child.stdout.take().map_or_else(Output::closed, Output::collect);
        let stderr = child.stderr.take().map_or_else(Output::closed, Output::collect);
        let (stdin, pid) = (child.stdin.take(), child.id());
        let child = Arc::new(Mutex::new(child));
        stop::register(&child);
        let mut transcripts = locked(&TRANSCRIPTS);
        transcripts.push((format!("{name} stdout"), stdout.clone()));
        transcripts.push((format!("{name} stderr"), stderr.clone()));
        Ok(Self { name: name.into(), child, pid, stdin, stdout, stderr })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    /// When it does not read any more.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is no pipe")?;
        writeln!(stdin, "{line}").with_context(|| format!("{} reads no input", self.name))
    }

    /// Sends a signal, if it has not ended.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Under the lock nobody reaps it, so that the number is still its own.
        let mut child = locked(&self.child);
        if child.try_wait()?.is_none() {
            let pid = Pid::from_raw(self.pid as i32).context("no process id")?;
            kill_process(pid, signal)?;
        }
        Ok(())
    }

    /// SIGKILL, at once.
    pub fn kill(&self) {
        // Fails when it has ended, which is what was wanted.
        let _ = locked(&self.child).kill();
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn has_ended(&self) -> Result<bool> {
        Ok(locked(&self.child).try_wait()?.is_some())
    }

    /// Waits for its end, [`TIMEOUT`] at most.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait(&self) -> Result<Ended> {
        self.wait_within(TIMEOUT)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn wait_within(&self, limit: Duration) -> Result<Ended> {
        let deadline = Instant::now() + limit;
        loop {
            let status = locked(&self.child).try_wait()?;
            if let Some(status) = status {
                self.stdout.wait_closed(TIMEOUT);
                self.stderr.wait_closed(TIMEOUT);
                return Ok(Ended { status, stderr: self.stderr.lines() });
            }
            ensure!(Instant::now() < deadline, "{} has not ended within {limit:?}", self.name);
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let mut child = locked(&self.child);
        let _ = child.kill();
        let _ = child.wait();
    }
}
