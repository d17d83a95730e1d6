//! The `memory-agent` binary, and a guest with cold memory for it to look at.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use memory_agent::{Counts, FileView, PageCache, PageNumber, PageRange, Probe, Residency};
use thermocline::control::Request;

use crate::binary;
use crate::machine::{Machine, Sandbox, Workload};
use crate::process::{Ended, Process, Standard, TIMEOUT};
use crate::residency::must_be_near;

/// The name of guest RAM's memory files.
const NAME: &str = "thermocline-guest-ram";
/// Pages that a reader reads at a time.
const BATCH: u64 = 64;

/// Two thirds of the memory cold.
pub const COLD: Workload = Workload { memory: 192, working_set: 24, cold: 128, rate: 2000, writes: 50, cpus: 1 };

/// Starts `memory-agent WORDS... --pid PID MORE...`.
///
/// # Errors
/// When it cannot be started.
pub fn start(words: &[&str], pid: u32, more: &[&str]) -> Result<Process> {
    start_on(Standard::Pipes, words, pid, more)
}

/// The same somewhere else than on pipes.
///
/// # Errors
/// As [`start`].
pub fn start_on(standard: Standard, words: &[&str], pid: u32, more: &[&str]) -> Result<Process> {
    let mut command: Vec<OsString> = vec![binary::memory_agent()?.into()];
    command.extend(words.iter().map(Into::into));
    command.extend(["--pid".into(), pid.to_string().into()]);
    command.extend(more.iter().map(Into::into));
    Process::start("memory-agent", &command, standard)
}

/// Runs it to its end: how it ended, and what it printed.
///
/// # Errors
/// When it does not end.
pub fn run(words: &[&str], pid: u32, more: &[&str]) -> Result<(Ended, Vec<String>)> {
    let process = start(words, pid, more)?;
    Ok((process.wait()?, process.stdout.lines()))
}

/// Runs it to its end, which is a success without complaints; what it printed.
///
/// # Errors
/// When it is something else.
pub fn prints(words: &[&str], pid: u32, more: &[&str]) -> Result<Vec<String>> {
    let (ended, lines) = run(words, pid, more)?;
    ensure!(ended.code() == Some(0) && ended.stderr.is_empty(), "{words:?} {more:?}: {ended:?}");
    Ok(lines)
}

/// Runs it to its end, which is a failure with this code and one clear line; the line.
///
/// # Errors
/// When it is something else.
pub fn fails(code: i32, words: &[&str], pid: u32, more: &[&str]) -> Result<String> {
    let (ended, lines) = run(words, pid, more)?;
    ensure!(lines.is_empty(), "it printed {lines:?}");
    sentence(&ended, code)
}

/// Checks that it ended with this code and said one clear line besides that it guards; gives the line.
///
/// # Errors
/// When it did not.
pub fn sentence(ended: &Ended, code: i32) -> Result<String> {
    ensure!(ended.code() == Some(code), "ended with {} instead of code {code}: {:?}", ended.status, ended.stderr);
    let lines: Vec<_> = ended.stderr.iter().filter(|line| !line.starts_with("memory-agent: guarding ")).collect();
    let [line] = lines.as_slice() else { bail!("not one line with code {code} but {lines:?}") };
    let sentence = line.strip_prefix("memory-agent: ").with_context(|| format!("nameless: {line:?}"))?;
    ensure!(sentence.split_whitespace().count() >= 3, "no sentence: {line:?}");
    for noise in ["panicked", "RUST_BACKTRACE", "Os {", "Error {", "Some(", "kind:"] {
        ensure!(!line.contains(noise), "not for people: {line:?}");
    }
    Ok(sentence.to_owned())
}

/// A paused guest, with its cold memory paged out: nothing moves unless somebody moves it.
#[derive(Debug)]
pub struct ColdGuest {
    /// The machine.
    pub machine: Machine,
    /// What its pages were once it was paused.
    pub before: Counts,
    view: FileView,
}

impl ColdGuest {
    /// Starts one.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn new(sandbox: &Sandbox) -> Result<Self> {
        Self::with(sandbox, &["--agent-budget", "0"])
    }

    /// The same with other options of `thermocline run` than that its own agent leaves it alone.
    ///
    /// # Errors
    /// As [`ColdGuest::new`].
    pub fn with(sandbox: &Sandbox, more: &[&str]) -> Result<Self> {
        let machine = sandbox.boot_with(more, &COLD)?;
        machine.page_out_cold(&machine.console.ready()?)?;
        machine.console.must_run()?;
        machine.ask(&Request::Pause {})?;
        machine.console.must_be_paused()?;
        let view = FileView::of_process(machine.process.pid(), NAME)?;
        let mut guest = Self { machine, before: Counts::default(), view };
        guest.before = guest.truth()?.counts();
        must_be_near("swapped to begin with", guest.before.swapped, COLD.cold << 8, 2)?;
        Ok(guest)
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.machine.process.pid()
    }

    /// Its pages.
    pub fn pages(&self) -> u64 {
        self.view.mapping().pages()
    }

    /// What its pages are, by the exact probe through a mapping of the file that nobody touches.
    ///
    /// # Errors
    /// When the host does not say.
    pub fn truth(&self) -> Result<Residency> {
        Ok(PageCache.residency(&self.view.mapping(), 0..self.pages())?)
    }

    /// How many of its pages are what, quickly.
    ///
    /// # Errors
    /// When the host does not say.
    pub fn counts(&self) -> Result<Counts> {
        Ok(memory_agent::counts_of(&self.view.mapping())?)
    }

    /// Checks that memory is as warm and as cold as it was, within one percent.
    ///
    /// # Errors
    /// When it is not.
    pub fn must_be_as_before(&self) -> Result<()> {
        let now = self.truth()?.counts();
        must_be_near("swapped, as before", now.swapped, self.before.swapped, 1)?;
        must_be_near("resident, as before", now.resident, self.before.resident, 1)?;
        must_be_near("holes, as before", now.hole, self.before.hole, 1)
    }

    /// Reads all of it by the file, as any tool would; what it holds.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        let mut bytes = vec![0; (BATCH * memory_agent::PAGE_SIZE) as usize];
        for first in self.view.mapping().all_in_file().pages().step_by(BATCH as usize) {
            self.view.read(&first.run(BATCH), &mut bytes)?;
            content.extend_from_slice(&bytes);
        }
        Ok(content)
    }

    /// A path by which other programs can read its memory.
    ///
    /// # Errors
    /// When there is none.
    pub fn memory_path(&self) -> Result<PathBuf> {
        let links = std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.flatten().map(|entry| entry.path());
        let is_memory =
            |path: &PathBuf| std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains(NAME));
        links.into_iter().find(is_memory).context("the machine has no memory file")
    }
}

/// Waits until a guard is ready; the pages that it says are swapped.
///
/// # Errors
/// When it never is.
pub fn guarding(process: &Process, pid: u32) -> Result<u64> {
    let start = format!("memory-agent: guarding PID {pid}: ");
    let ready = |line: &str| line.strip_prefix(&start)?.strip_suffix(" pages swapped")?.parse().ok();
    Ok(process.stderr.wait_for(0, TIMEOUT, ready).context("it does not guard")?.1)
}
