//! A guest in a process of its own, driven as a user would: by its console and its API socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use memory_agent::picture;
use workload_guest::report::{CheckedAll, Ready, Report as GuestReport};
use workload_guest::{Command as GuestCommand, Line};

use crate::cli::progress;
use crate::control::client::ask;
use crate::control::{Answer, MigrateRequest, PagesReport, Request};
use crate::migration::progress::Report;

/// How long to wait for the guest to say something in particular: filling and checking memory takes a while.
const TIMEOUT: Duration = Duration::from_secs(120);
/// How often to look whether the user has interrupted.
const LOOK: Duration = Duration::from_millis(100);

/// A folder of our own for sockets; removed at the end.
pub(super) struct Directory {
    path: PathBuf,
    guests: AtomicU32,
}

impl Directory {
    pub(super) fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("thermocline-demo-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path, guests: AtomicU32::new(0) })
    }

    fn next_socket(&self) -> PathBuf {
        self.path.join(format!("{}.sock", self.guests.fetch_add(1, Ordering::Relaxed)))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Leaving an empty folder behind is the worst that can happen.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Waits, unless the user interrupts.
pub(super) fn wait(time: Duration, interrupted: &AtomicBool) -> anyhow::Result<()> {
    let until = Instant::now() + time;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        anyhow::ensure!(!interrupted.load(Ordering::SeqCst), "interrupted");
        std::thread::sleep(left.min(LOOK));
    }
    Ok(())
}

/// A guest's process.
pub(super) struct Guest {
    child: Child,
    console: ChildStdin,
    lines: Receiver<Line>,
    latest: Arc<Mutex<Option<GuestReport>>>,
    said: Receiver<String>,
    socket: PathBuf,
    interrupted: Arc<AtomicBool>,
}

impl Guest {
    /// Starts `thermocline run` with these options.
    pub(super) fn run(directory: &Directory, options: &[&str], interrupted: Arc<AtomicBool>) -> anyhow::Result<Self> {
        Self::start("run", options, directory.next_socket(), interrupted)
    }

    /// Starts `thermocline receive` on a loopback port.
    pub(super) fn receive(directory: &Directory, interrupted: Arc<AtomicBool>) -> anyhow::Result<Self> {
        Self::start("receive", &["--listen", "tcp:127.0.0.1:0"], directory.next_socket(), interrupted)
    }

    fn start(command: &str, options: &[&str], socket: PathBuf, interrupted: Arc<AtomicBool>) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe().context("this program's own path is not known")?)
            .arg(command)
            .args(options)
            .args([Path::new("--api-socket"), &socket])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("this program cannot be started a second time")?;
        let streams = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(console), Some(output), Some(errors)) = streams else { bail!("a child without a console") };
        let latest = Arc::new(Mutex::new(None));
        Ok(Self {
            lines: read_console(output, Arc::clone(&latest))?,
            said: read_lines(errors)?,
            child,
            console,
            latest,
            socket,
            interrupted,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where `receive` listens, as it says itself.
    pub(super) fn address(&self) -> anyhow::Result<String> {
        let line = self.said.recv_timeout(TIMEOUT).context("the receiving process said nothing")?;
        let address = line.split_once("waiting for a guest on ").map(|(_, address)| address.trim().to_owned());
        address.with_context(|| format!("the receiving process cannot listen: {line}"))
    }

    /// Waits until the guest has written all its memory.
    pub(super) fn ready(&self) -> anyhow::Result<Ready> {
        self.expect("that it is ready", |line| match line {
            Line::Ready(ready) => Some(ready),
            _ => None,
        })
    }

    /// Lets the guest forget the longest stall it has seen.
    pub(super) fn reset_stall(&self) -> anyhow::Result<()> {
        self.command(&GuestCommand::ResetStall)?;
        self.expect("that it starts counting anew", |line| matches!(line, Line::Ack(_)).then_some(()))
    }

    /// The longest stall since, in microseconds, once the guest has been here for some reports.
    pub(super) fn stall_after_arrival(&self) -> anyhow::Result<u64> {
        let mut reports = 0;
        self.expect("how it is doing", |line| match line {
            Line::Report(report) => {
                reports += 1;
                (reports == 3).then_some(report.longest_stall_us)
            }
            _ => None,
        })
    }

    /// Lets the guest check every page.
    pub(super) fn check_all(&self) -> anyhow::Result<CheckedAll> {
        self.command(&GuestCommand::Check)?;
        self.expect("what it found", |line| match line {
            Line::CheckedAll(checked) => Some(checked),
            _ => None,
        })
    }

    /// The guest's last report.
    pub(super) fn latest_report(&self) -> anyhow::Result<GuestReport> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).context("the guest never reported")
    }

    /// Lets the guest switch itself off and waits for its process.
    pub(super) fn power_off(mut self) -> anyhow::Result<()> {
        self.command(&GuestCommand::Off)?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends the process.
    pub(super) fn quit(mut self) -> anyhow::Result<()> {
        self.ask(&Request::Quit { force: false })?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks the monitor.
    pub(super) fn ask(&self, request: &Request) -> anyhow::Result<Answer> {
        Ok(ask(&self.socket, request, |_| {})?)
    }

    /// What guest RAM is.
    pub(super) fn pages(&self) -> anyhow::Result<PagesReport> {
        match self.ask(&Request::Pages { cells: picture::CELLS, from_agent: false })? {
            Answer::Pages(pages) => Ok(pages),
            other => bail!("the monitor answered {other:?} to pages"),
        }
    }

    /// Migrates the guest away, with a progress bar unless `quiet`.
    pub(super) fn migrate(&self, request: MigrateRequest, quiet: bool) -> anyhow::Result<Report> {
        let mut shown = (!quiet).then(|| progress::Shown::new(false));
        let answer = ask(&self.socket, &Request::Migrate(request), |progress| {
            if let Some(shown) = &mut shown {
                shown.show(progress);
            }
        });
        if let Some(shown) = shown {
            shown.finish()?;
        }
        match answer? {
            Answer::Migrated(report) => Ok(report),
            other => bail!("the monitor answered {other:?} to migrate"),
        }
    }

    fn command(&self, command: &GuestCommand) -> anyhow::Result<()> {
        writeln!(&self.console, "{command}").context("the guest's console is gone")
    }

    /// Waits for a line that `wanted` wants.
    fn expect<T>(&self, what: &str, mut wanted: impl FnMut(Line) -> Option<T>) -> anyhow::Result<T> {
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            anyhow::ensure!(!self.interrupted.load(Ordering::SeqCst), "interrupted");
            match self.lines.recv_timeout(LOOK) {
                Ok(Line::Error(error)) => bail!("the guest says: {}", error.message),
                Ok(Line::Panic(panic)) => bail!("the guest panicked: {panic:?}"),
                Ok(line) => {
                    if let Some(found) = wanted(line) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let last: Vec<_> = self.said.try_iter().collect();
                    bail!("the guest's process ended: {}", last.join("; "));
                }
            }
        }
        bail!("the guest did not say {what} within {} s", TIMEOUT.as_secs())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Has ended already in the ordinary course.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_console(
    output: impl Read + Send + 'static,
    latest: Arc<Mutex<Option<GuestReport>>>,
) -> anyhow::Result<Receiver<Line>> {
    let (sender, receiver) = channel();
    std::thread::Builder::new().name("console".into()).spawn(move || {
        for text in BufReader::new(output).lines().map_while(Result::ok) {
            // The tail of a line that began at the other host is no line.
            let Ok(line) = Line::parse(&text) else { continue };
            if let Line::Report(report) = &line {
                *latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(*report);
            }
            if sender.send(line).is_err() {
                break;
            }
        }
    })?;
    Ok(receiver)
}

fn read_lines(stream: impl Read + Send + 'static) -> anyhow::Result<Receiver<String>> {
    let (sender, receiver) = channel();
    std::thread::Builder::new().name("messages".into()).spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    })?;
    Ok(receiver)
}
