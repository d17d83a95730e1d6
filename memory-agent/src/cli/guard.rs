//! `memory-agent guard`

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use clap::Args;
use command_line::{End, print_result};
use indicatif::ProgressBar;
use memory_agent::{ByteSize, GuardError, GuardReport, ProcessMemory, ResidencyGuard, Target, TargetError};
use rustix::process::{Pid, Signal, kill_process, setpriority_process};

use super::exit::{Coded, ExitCode, end_of};
use super::map_file::MapFile;
use super::options::{Memory, duration};
use super::output::say;
use super::stop::Stop;

/// Pages are swapped in by the million: whoever pages them out again must not wait behind whoever swaps them in.
const NICENESS: i32 = -10;
/// How often to look whether the process still maps the memory.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Options of `memory-agent guard`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    memory: Memory,
    /// How much of what should be swapped may be resident at a time, of each memory; about.
    #[arg(long, value_name = "SIZE", default_value = "16MiB")]
    window: ByteSize,
    /// Make the memory like this map, printed by `map --json`, instead of like it is now: at a migration's destination,
    /// the map of the guest at its source.
    #[arg(long, value_name = "FILE")]
    like: Option<PathBuf>,
    /// How often to look.
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = duration)]
    interval: Duration,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Guard while this command runs, then exit with its code; without one, guard until Ctrl-C or SIGTERM. The result
    /// goes to standard error then, since standard output is the command's.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let stop = Stop::on_signals()?;
    let opened = arguments.memory.open()?;
    let mut guard = Guard::new(&opened.memories, arguments)?;
    let pid = arguments.memory.pid;
    say(format!("guarding PID {pid}: {} pages swapped", guard.report().snapshot.swapped));
    let mut command = start(&arguments.command)?;
    // Behind the command's start, which would inherit it. Without it all is as well, only slower.
    let _ = setpriority_process(None, NICENESS);

    let status = guard.watch(arguments, &stop, command.as_mut());
    let end = guard.finish();
    let report = guard.report();
    let text =
        if arguments.json { format!("{}\n", serde_json::json!(opened.object(&report))) } else { sentences(&report) };
    match &status {
        None => print_result(&text)?,
        // Standard output is the command's. When nobody hears it, all is done that there was to do.
        Some(_) => drop(std::io::stderr().write_all(text.as_bytes())),
    }
    match (status.transpose()?, end) {
        (Some(status), _) if !status.success() => Err(End::silent(code_of(status))),
        // The command may have had no other purpose than to move the memory elsewhere.
        (Some(_), Some(ExitCode::Gone)) | (_, None) => Ok(()),
        (_, Some(code)) => Err(End::silent(code)),
    }
}

/// Starts the command, if there is one.
fn start(command: &[OsString]) -> Result<Option<Child>, End> {
    let [program, arguments @ ..] = command else { return Ok(None) };
    let started = Command::new(program).args(arguments).spawn();
    let failed = |e| End::text(ExitCode::NoCommand, format!("cannot start {}: {e}", Path::new(program).display()));
    started.map(Some).map_err(failed)
}

/// A command's code as shells have it.
fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(ExitCode::Failure as u8)
}

/// One guard a memory.
struct Guard<'t> {
    memories: &'t [ProcessMemory],
    guards: Vec<ResidencyGuard<'t>>,
    reports: Vec<GuardReport>,
    /// When the process was last seen to have the memory.
    checked: Instant,
    /// Set once it does not guard any more: the code for why, which has been said; a process that has ended is a success.
    ended: Option<ExitCode>,
    /// Whether somebody has been told that nothing can be paged out now.
    complained: bool,
}

impl<'t> Guard<'t> {
    fn new(memories: &'t [ProcessMemory], arguments: &Arguments) -> Result<Self, End> {
        let window = arguments.window.pages();
        let guards: Result<Vec<_>, GuardError> = match &arguments.like {
            None => memories.iter().map(|memory| ResidencyGuard::new(memory, window)).collect(),
            Some(path) => {
                let maps = MapFile::read(path)?.memories;
                if maps.len() != memories.len() {
                    let (file, there) = (maps.len(), memories.len());
                    let text = format!(
                        "{} has maps of {file} memories and the process has {there}: give both the same --name",
                        path.display()
                    );
                    return Err(End::text(ExitCode::Usage, text));
                }
                let pairs = memories.iter().zip(maps);
                pairs.map(|(memory, map)| ResidencyGuard::like(memory, window, map.runs)).collect()
            }
        };
        let mut guard = Self {
            memories,
            guards: guards.map_err(end_of)?,
            reports: Vec::new(),
            checked: Instant::now(),
            ended: None,
            complained: false,
        };
        guard.step().map_err(end_of)?;
        Ok(guard)
    }

    /// Guards until the command has ended, whose status is then told, or it is asked to stop.
    fn watch(
        &mut self,
        arguments: &Arguments,
        stop: &Stop,
        mut command: Option<&mut Child>,
    ) -> Option<Result<ExitStatus, End>> {
        // A command has the terminal for itself.
        let watched = command.is_none() && std::io::stderr().is_terminal();
        let shown = if watched { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        loop {
            let started = Instant::now();
            if self.ended.is_none() {
                self.try_step();
                shown.set_message(line(&self.report()));
                shown.tick();
            }
            // A step that had much to restore is followed by the next soon; not at once, since each looks at all memory.
            let pause = arguments.interval.saturating_sub(started.elapsed()).max(arguments.interval / 4);
            match &mut command {
                Some(command) => {
                    // Ctrl-C reaches the command by itself, and it may have its own idea of what that means.
                    if stop.take_terminate()
                        && let Some(pid) = Pid::from_raw(command.id().cast_signed())
                    {
                        let _ = kill_process(pid, Signal::TERM);
                    }
                    match command.try_wait() {
                        Ok(Some(status)) => return Some(Ok(status)),
                        Ok(None) => std::thread::sleep(pause),
                        Err(e) => return Some(Err(End::new(ExitCode::Failure, e))),
                    }
                }
                None if self.ended.is_some() || stop.wait(pause) => {
                    shown.finish_and_clear();
                    return None;
                }
                None => {}
            }
        }
    }

    fn step(&mut self) -> Result<(), GuardError> {
        // While nothing is to be restored, nothing else tells.
        if let Some(process) = self.memories.iter().map(|memory| memory.process()).find(|process| process.has_ended()) {
            return Err(TargetError::Exited(process.pid()).into());
        }
        if self.checked.elapsed() > CHECK_EVERY {
            self.memories.iter().try_for_each(Target::check)?;
            self.checked = Instant::now();
        }
        self.reports = self.guards.iter_mut().map(ResidencyGuard::step).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// A step; when it cannot be done, says why, and guards no more unless that may pass.
    fn try_step(&mut self) {
        match self.step() {
            Ok(()) => {}
            // There may be room again before the end.
            Err(e) if e.code() == ExitCode::NoSwap => {
                if !std::mem::replace(&mut self.complained, true) {
                    say(e);
                }
            }
            Err(e) => self.ended = Some(told(&e)),
        }
    }

    /// Restores all that is left to be; what went wrong, here or before, is told.
    fn finish(&mut self) -> Option<ExitCode> {
        if let Some(end) = self.ended {
            return (end != ExitCode::Success).then_some(end);
        }
        let mut end = None;
        for (guard, report) in std::mem::take(&mut self.guards).into_iter().zip(&mut self.reports) {
            match guard.finish() {
                Ok(finished) => *report = finished,
                Err(e) => {
                    end.get_or_insert(told(&e));
                }
            }
        }
        end.filter(|end| *end != ExitCode::Success)
    }

    /// Of all memories.
    fn report(&self) -> GuardReport {
        self.reports.iter().fold(GuardReport::default(), |sum, one| GuardReport {
            snapshot: sum.snapshot + one.snapshot,
            brought_in: sum.brought_in + one.brought_in,
            restored: sum.restored + one.restored,
            refaulted: sum.refaulted + one.refaulted,
            excess: sum.excess + one.excess,
            excess_peak: sum.excess_peak + one.excess_peak,
        })
    }
}

/// Says what went wrong, and gives its code.
fn told(error: &GuardError) -> ExitCode {
    say(error);
    if error.is_end_of_process() { ExitCode::Success } else { error.code() }
}

fn line(report: &GuardReport) -> String {
    let GuardReport { brought_in, restored, refaulted, excess, .. } = report;
    format!(
        "{excess} pages resident that should not be; {brought_in} brought in, {restored} restored, {refaulted} refaulted by their owner"
    )
}

fn sentences(report: &GuardReport) -> String {
    let GuardReport { snapshot, brought_in, restored, refaulted, excess, excess_peak } = report;
    format!(
        "to be restored: {} resident, {} swapped and {} hole pages\n\
         brought in {brought_in} and restored {restored}, {refaulted} of which their owner refaulted; \
         {excess} are resident and should not be, at most {excess_peak} were\n",
        snapshot.resident, snapshot.swapped, snapshot.hole
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_as_shells_have_it() {
        let of = |script: &str| code_of(Command::new("sh").args(["-c", script]).status().unwrap());
        assert_eq!((of("exit 0"), of("exit 7"), of("kill -9 $$")), (0, 7, 137));
    }
}
