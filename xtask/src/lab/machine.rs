//! The emulated machine: QEMU without KVM, whose processor has AMD-V, so that the kernel in it has a real `/dev/kvm`.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use command_line::{Output, note};
use tempfile::NamedTempFile;

use super::kernel;
use super::qemu::Qemu;
use crate::step::{root, shown};

/// What the host's kernel says is in the log behind this, so that it cannot be taken for what a guest in it says.
const KERNEL: &str = "kernel| ";
const DISK_BYTES: u64 = 512 << 20;
/// How many lines of the log are shown when the machine fails.
const SHOWN: usize = 40;

/// One thing that was run.
pub(super) struct Trial {
    pub(super) name: String,
    pub(super) code: i32,
}

/// What came out of the machine.
pub(super) struct Results {
    pub(super) trials: Vec<Trial>,
    /// Everything that its two consoles showed: the trials' lines as they are, the kernel's behind a mark.
    pub(super) log: PathBuf,
}

impl Results {
    /// The last lines that a trial has printed.
    pub(super) fn end_of(&self, trial: &str) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        section(&text, trial)
    }
}

fn section(log: &str, trial: &str) -> String {
    let begin = format!("LAB-BEGIN {trial}");
    let lines = log.lines().skip_while(|line| *line != begin).skip(1).take_while(|line| !line.starts_with("LAB-END "));
    let lines: Vec<_> = lines.collect();
    lines[lines.len().saturating_sub(2 * SHOWN)..].join("\n")
}

/// How a machine's processors are emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Processors {
    /// Two, each in a thread of its own: the quickest. Now and then the emulator goes on in a nested guest with its host's
    /// instruction pointer, stack and interrupt table (docs/host-kernel.md).
    Parallel,
    /// Two, which take turns in one thread. Linux guests with two vCPUs stand still there.
    InTurn,
    /// One, whose time stamp counter counts instructions: slower, and the same in every run.
    Counting,
}

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct LabMachine<'a> {
    /// Of its log.
    pub(super) name: &'a str,
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    pub(super) processors: Processors,
    /// All that a trial says is shown, not only what it comes to.
    pub(super) shows_everything: bool,
    /// What its kernel is told besides.
    pub(super) parameters: &'a str,
    /// How long it may take.
    pub(super) limit: Duration,
}

impl LabMachine<'_> {
    fn qemu(&self, disk: &Path, more: &str) -> Result<Command> {
        let mut qemu = Qemu::get()?.command();
        match self.processors {
            Processors::Parallel => qemu.args(["-accel", "tcg,thread=multi", "-smp", "2"]),
            Processors::InTurn => qemu.args(["-accel", "tcg,thread=single", "-smp", "2"]),
            Processors::Counting => {
                qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"])
            }
        };
        // Its interrupts are routed by a table; the older machine's by a program, which times out in a kernel with KASAN.
        qemu.args(["-machine", "q35"]);
        qemu.args(["-cpu", "EPYC,+svm,+npt", "-m", "3G", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .args(["-drive", &format!("file={},format=raw,if=virtio,cache=unsafe", disk.display())])
            .args(["-virtfs", &format!("local,path={},mount_tag=lab,security_model=none", payload().display())])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", &format!("console=ttyS0 panic=-1 oops=panic loglevel=4 {} {more}", self.parameters)]);
        Ok(qemu)
    }
}

/// The machine's disk, `/dev/vda`: empty, and gone with the machine.
fn disk() -> Result<NamedTempFile> {
    let disk = NamedTempFile::new_in(kernel::cache()?).context("no room for the lab's disk")?;
    disk.as_file().set_len(DISK_BYTES)?;
    Ok(disk)
}

/// The folder that the machine shares.
fn payload() -> PathBuf {
    root().join("target/lab/payload")
}

/// A machine that is ended with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots, runs the initramfs's script inside, and gives what its trials came to.
///
/// # Errors
/// When the kernel panics, the machine hangs, or does not say that it is done; with the end of its log.
pub(super) fn run(machine: &LabMachine<'_>) -> Result<Results> {
    let disk = disk()?;
    let log = kernel::cache()?.join(format!("machine-{}.log", machine.name));
    let mut command = machine.qemu(disk.path(), "")?;
    // The kernel's console, where the emulator complains too; then that of what is run.
    command.args(["-serial", "file:/dev/stderr", "-serial", "stdio"]);
    note(format_args!("$ {}", shown(&command)));
    let trials = watch(&mut command, &log, machine.limit, machine.shows_everything, || {
        // It has them open. Whatever ends this process from here on, they are gone with the machine.
        let _ = fs::remove_file(disk.path());
        let _ = fs::remove_file(machine.initramfs);
    })?;
    Ok(Results { trials, log })
}

/// Starts a machine and listens to its consoles, which go to the log, until it ends: to that of what is run on its standard
/// output, to the kernel's on its standard error. `started` is called when the first line has come from
/// inside.
fn watch(
    command: &mut Command,
    log: &Path,
    limit: Duration,
    shows_everything: bool,
    started: impl FnOnce(),
) -> Result<Vec<Trial>> {
    let mut file = File::create(log).with_context(|| log.display().to_string())?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut running = Running(child.context("the emulator cannot be started")?);
    let (sender, lines) = channel();
    hear(running.0.stdout.take().context("no console")?, "", sender.clone());
    hear(running.0.stderr.take().context("no console")?, KERNEL, sender);
    let deadline = Instant::now() + limit;
    let mut started = Some(started);
    let mut said = LabConsole::default();
    let mut output = Output::default();
    let why = loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                // The emulator itself may complain before it has opened all its files.
                let is_inside = line.strip_prefix(KERNEL).is_none_or(|said| said.starts_with('['));
                if let Some(started) = started.take_if(|_| is_inside) {
                    started();
                }
                writeln!(file, "{line}")?;
                if said.read(&line) || shows_everything && said.current.is_some() {
                    output.line(format_args!("  lab| {line}"))?;
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                let doing = said.current.as_ref().map_or(String::new(), |trial| format!(", in {trial}"));
                break Some(format!("was not done after {limit:?}{doing}"));
            }
            Err(RecvTimeoutError::Disconnected) => break None,
        }
    };
    let was_late = why.is_some();
    let status = if was_late { None } else { status_of(&mut running.0) };
    if let Some(why) = why.or_else(|| said.what_is_wrong()) {
        let text = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
        let status = status.map_or(String::new(), |status| format!(" ({status})"));
        let error = anyhow!("the lab's machine {why}{status}; the end of {}:\n{end}", log.display());
        return Err(if said.ended_without_a_word() && !was_late { error.context(WithoutAWord) } else { error });
    }
    Ok(said.trials)
}

/// Sends each line of a console with this mark in front of it.
fn hear(console: impl Read + Send + 'static, mark: &'static str, to: Sender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n') {
            let Ok(line) = line else { return };
            let line = format!("{mark}{}", String::from_utf8_lossy(&line).trim_end_matches('\r'));
            if to.send(line).is_err() {
                return;
            }
        }
    });
}

/// How a process has ended that is about to.
fn status_of(child: &mut Child) -> Option<ExitStatus> {
    let look = |_| {
        let status = child.try_wait().ok().flatten();
        if status.is_none() {
            std::thread::sleep(Duration::from_millis(50));
        }
        status
    };
    (0..100).find_map(look)
}

/// A machine ended in the middle of a trial, no trial before it had failed, and neither its kernel nor its emulator said why:
/// most likely the emulated processor reset it.
#[derive(Debug)]
pub(super) struct WithoutAWord;

impl fmt::Display for WithoutAWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("without a word")
    }
}

/// A prompt inside, on this terminal.
///
/// # Errors
/// When there is no emulator.
pub(super) fn shell(machine: &LabMachine<'_>) -> Result<()> {
    note(format_args!(
        "the project's programs are in /lab, an empty disk is /dev/vda; `exit` ends the machine, as does Ctrl-A X"
    ));
    let disk = disk()?;
    let mut command = machine.qemu(disk.path(), "lab-shell")?;
    command.args(["-serial", "mon:stdio"]);
    // Its end is told by a code that is never 0.
    command.status().context("the emulator cannot be started")?;
    Ok(())
}

/// What the console has shown so far.
#[derive(Default)]
struct LabConsole {
    trials: Vec<Trial>,
    /// Begun and not ended.
    current: Option<String>,
    /// The current trial has run no test: its filter has nothing that it fits.
    is_empty: bool,
    trouble: Option<String>,
    done: bool,
}

/// What the host's kernel says when something is wrong with it. Guests' kernels say the same, on another console.
const TROUBLE: [&str; 8] = [
    "Kernel panic",
    "BUG:",
    "WARNING:",
    "Oops:",
    "Bad page",
    "KASAN:",
    "unable to mount root",
    "rcu_sched detected stalls",
];

impl LabConsole {
    /// Takes in a line; whether a person wants to see it.
    fn read(&mut self, line: &str) -> bool {
        if let Some(said) = line.strip_prefix(KERNEL) {
            let is_trouble = TROUBLE.iter().any(|trouble| said.contains(trouble));
            if is_trouble {
                self.has_trouble(said);
            }
            return is_trouble;
        }
        if let Some(name) = line.strip_prefix("LAB-BEGIN ") {
            self.current = Some(name.to_owned());
            self.is_empty = false;
            return true;
        }
        if let Some(rest) = line.strip_prefix("LAB-END ") {
            let (code, name) = rest.split_once(' ').unwrap_or((rest, ""));
            let code = if self.is_empty { -1 } else { code.parse().unwrap_or(-1) };
            self.trials.push(Trial { name: name.to_owned(), code });
            self.current = None;
            return true;
        }
        if line == "running 0 tests" {
            self.is_empty = true;
            return true;
        }
        if line.starts_with("LAB-DONE ") {
            self.done = true;
            return false;
        }
        if line.starts_with("LAB-PROBLEM ") {
            self.has_trouble(line);
            return true;
        }
        ["test ", "ok ", "not ok ", "# ", "uffd-marker, ", "marker, ", "exact, ", "skipped"]
            .iter()
            .any(|start| line.starts_with(start))
    }

    /// The first counts.
    fn has_trouble(&mut self, line: &str) {
        self.trouble.get_or_insert_with(|| line.to_owned());
    }

    fn ended_without_a_word(&self) -> bool {
        let all_passed = self.trials.iter().all(|trial| trial.code == 0);
        self.trouble.is_none() && !self.done && self.current.is_some() && all_passed
    }

    fn what_is_wrong(&self) -> Option<String> {
        match (&self.trouble, self.done, &self.current) {
            (Some(trouble), ..) => Some(format!("has said: {trouble}")),
            (None, true, _) => None,
            (None, false, Some(trial)) => Some(format!("ended in the middle of {trial}")),
            (None, false, None) => Some("ended before it was done".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(text: &str) -> LabConsole {
        let mut console = LabConsole::default();
        for line in text.lines() {
            console.read(line);
        }
        console
    }

    #[test]
    fn trials_are_counted_with_their_codes() {
        let console = console("LAB-BEGIN a b\nchatter\nLAB-END 0 a b\nLAB-BEGIN c\nLAB-END 101 c\nLAB-DONE 1");
        let trials: Vec<_> = console.trials.iter().map(|trial| (trial.name.as_str(), trial.code)).collect();
        assert_eq!(trials, [("a b", 0), ("c", 101)]);
        assert_eq!(console.what_is_wrong(), None);
    }

    /// A machine whose consoles say what a shell script prints; its kernel's is standard error.
    fn play(script: &str, limit: Duration) -> Result<Vec<Trial>> {
        let log = NamedTempFile::new().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        watch(&mut command, log.path(), limit, false, || {})
    }

    #[test]
    fn machines_that_go_wrong_are_told_with_their_log() {
        const LONG: Duration = Duration::from_secs(60);
        let fails = |script, limit| format!("{:#}", play(script, limit).err().unwrap());
        let trials = play("echo LAB-BEGIN a; echo LAB-END 0 a; echo LAB-DONE 0", LONG).unwrap();
        assert_eq!(trials.len(), 1);
        let panic = fails("echo LAB-BEGIN a; echo 'Kernel panic - not syncing: Fatal exception' >&2", LONG);
        assert!(panic.contains("has said: Kernel panic") && panic.contains("LAB-BEGIN a"), "{panic}");
        let guest = play("echo LAB-BEGIN a; echo '[ 1.0] WARNING: CPU: 0'; echo LAB-END 0 a; echo LAB-DONE 0", LONG);
        assert_eq!(guest.unwrap().len(), 1, "a guest's trouble is its trial's affair");
        let begun = Instant::now();
        let hang = fails("echo LAB-BEGIN a; exec sleep 600", Duration::from_millis(300));
        assert!(hang.contains("was not done after 300ms, in a"), "{hang}");
        assert!(begun.elapsed() < LONG, "it was waited for");
        let ended = fails("echo LAB-BEGIN a", LONG);
        assert!(ended.contains("ended in the middle of a"), "{ended}");
        let is_silent = |script, limit| play(script, limit).err().unwrap().is::<WithoutAWord>();
        assert!(is_silent("echo LAB-BEGIN a; echo LAB-END 0 a; echo LAB-BEGIN b", LONG));
        assert!(!is_silent("echo LAB-BEGIN a; echo LAB-END 1 a; echo LAB-BEGIN b", LONG));
        assert!(!is_silent("echo LAB-BEGIN a; exec sleep 600", Duration::from_millis(300)));
        assert!(!is_silent("echo LAB-BEGIN a; echo 'Kernel panic - not syncing: Fatal exception' >&2", LONG));
        assert!(!is_silent("echo boot", LONG));
        let log = NamedTempFile::new().unwrap();
        let none = watch(&mut Command::new("/nowhere/qemu"), log.path(), LONG, false, || {}).err().unwrap();
        assert!(format!("{none:#}").contains("cannot be started"), "{none:#}");
    }

    #[test]
    fn a_trials_lines_are_found() {
        let log = "boot\nLAB-BEGIN a\n1\nLAB-END 0 a\nLAB-BEGIN a b\n2\n3\nLAB-END 1 a b\n";
        assert_eq!(section(log, "a b"), "2\n3");
        assert_eq!(section(log, "c"), "");
    }

    #[test]
    fn a_trial_that_tries_nothing_has_failed() {
        let log = "LAB-BEGIN a\nrunning 0 tests\nLAB-END 0 a\nLAB-BEGIN b\nrunning 1 test\nLAB-END 0 b\nLAB-DONE 0";
        let codes: Vec<_> = console(log).trials.iter().map(|trial| trial.code).collect();
        assert_eq!(codes, [-1, 0]);
    }

    #[test]
    fn an_unhappy_kernel_is_noticed() {
        let wrong = |text| console(text).what_is_wrong().unwrap();
        assert!(wrong("kernel| [ 1.0] WARNING: CPU: 0 PID: 1 at mm/x.c:1\nLAB-DONE 0").contains("mm/x.c"));
        assert!(wrong("LAB-PROBLEM no programs\nLAB-DONE 0").contains("no programs"));
        assert_eq!(console("[ 1.0] WARNING: CPU: 0 PID: 1 at mm/x.c:1\nLAB-DONE 0").what_is_wrong(), None);
        assert!(wrong("LAB-BEGIN a\n").contains("in the middle of a"));
        assert!(wrong("").contains("before it was done"));
    }
}
