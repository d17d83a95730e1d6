//! A child process, what the host says of it, and its certain end.

use std::fs::{read_dir, read_to_string};
use std::io::Read;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::lines::Lines;
use crate::stop;

/// Longer than anything takes that is not wrong.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(120);

/// A process with pipes; killed and waited for when dropped.
///
/// It is not waited for before, so that `/proc` tells of it what it told at its end.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// Its standard input.
    pub(crate) input: Option<ChildStdin>,
    complaints: Arc<Mutex<String>>,
}

impl Process {
    /// Starts the command; gives the process and what it will write to standard output.
    pub(crate) fn start(command: &mut Command) -> Result<(Self, Lines)> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let input = child.stdin.take();
        let (output, mut errors) = (child.stdout.take(), child.stderr.take());
        let complaints = Arc::new(Mutex::new(String::new()));
        let process = Self { child, input, complaints: Arc::clone(&complaints) };
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Some(Ok(length @ 1..)) = errors.as_mut().map(|errors| errors.read(&mut buffer)) {
                let text = String::from_utf8_lossy(&buffer[..length]);
                complaints.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            }
        });
        Ok((process, Lines::of(output.context("no pipe from the process")?)))
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard error so far.
    pub(crate) fn complaints(&self) -> String {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a line on standard error that starts with `prefix`, and gives the rest of it.
    pub(crate) fn wait_for_notice(&self, prefix: &str) -> Result<String> {
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            let text = self.complaints();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(rest) = whole.lines().find_map(|line| line.strip_prefix(prefix)) {
                return Ok(rest.to_owned());
            }
            stop::sleep(Duration::from_millis(2))?;
        }
        bail!("no line {prefix:?} within {TIMEOUT:?}, but: {}", self.complaints())
    }

    /// Asks it to end, as Ctrl-C does.
    pub(crate) fn interrupt(&self) -> Result<()> {
        let pid = Pid::from_raw(self.pid().cast_signed()).context("no process")?;
        // Not waited for yet, so the number is still its own.
        kill_process(pid, Signal::INT).context("kill")
    }

    /// Waits for its end, which is at hand.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().context("no word of the process's end")
    }

    /// CPU time it has used so far, user and system, guest included. The kernel tells it in steps of its clock tick,
    /// 10 ms as a rule.
    pub(crate) fn cpu_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid());
        let text = read_to_string(&path).with_context(|| path.clone())?;
        let ticks = cpu_ticks(&text).with_context(|| format!("{path} makes no sense: {text}"))?;
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }

    /// CPU time that its threads of this name have used so far, in the kernel's own unit of nanoseconds.
    pub(crate) fn cpu_time_of(&self, is_wanted: impl Fn(&str) -> bool) -> Result<Duration> {
        let mut sum = 0;
        for thread in read_dir(format!("/proc/{}/task", self.pid())).context("the process has ended")?.flatten() {
            // A thread may end meanwhile.
            let read = |name: &str| read_to_string(thread.path().join(name)).unwrap_or_default();
            if is_wanted(read("comm").trim_end()) {
                let first = read("schedstat").split(' ').next().and_then(|time| time.parse::<u64>().ok());
                sum += first.unwrap_or_default();
            }
        }
        Ok(Duration::from_nanos(sum))
    }

    /// Memory it has besides shared memory, in KiB: anonymous and of files (`RssAnon` and `RssFile`); `None` when it
    /// has none because it has ended.
    pub(crate) fn overhead_kib(&self) -> Option<u64> {
        overhead_of(self.pid())
    }
}

/// As [`Process::overhead_kib`], of the process with this number.
pub(crate) fn overhead_of(pid: u32) -> Option<u64> {
    private_kib(&read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// `utime` and `stime` of a `/proc/PID/stat`.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The program's name may have blanks and brackets in it; state is the first field behind it, number 3 of proc(5).
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_ascii_whitespace().skip(14 - 3);
    Some(times.next()?.parse::<u64>().ok()? + times.next()?.parse::<u64>().ok()?)
}

fn private_kib(status: &str) -> Option<u64> {
    let field = |name| {
        let value: &str = status.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim_start_matches(':').trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some(field("RssAnon")? + field("RssFile")?)
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_proc_says() {
        let stat = "12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 250 34 0 0 20";
        assert_eq!(cpu_ticks(stat), Some(284));
        assert_eq!(private_kib("VmRSS:\t 9 kB\nRssAnon:\t    12 kB\nRssFile:\t 30 kB\nRssShmem:\t 7 kB\n"), Some(42));
        assert_eq!(private_kib("State:\tZ (zombie)\n"), None);
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let (process, _lines) = Process::start(Command::new("sleep").arg("1000")).unwrap();
        let folder = format!("/proc/{}", process.pid());
        assert!(std::path::Path::new(&folder).exists());
        drop(process);
        assert!(!std::path::Path::new(&folder).exists());
    }
}
