//! The image in a stock QEMU: KVM where `/dev/kvm` is, else TCG. Without QEMU tests say so and pass, except where
//! `CI=true`: there nothing may be skipped.
#![allow(dead_code, reason = "each test program uses what it needs")]
#![allow(unreachable_pub, reason = "as above")]

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command as Process, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use workload_guest::report::{CheckedAll, Ready, Report};
use workload_guest::{Command, ELF, Line};

/// Long enough for the slowest emulation on the busiest machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

const KVM: &str = "/dev/kvm";

/// For tests that TCG cannot run.
pub fn has_kvm() -> bool {
    let found = Path::new(KVM).exists();
    if !found {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "CI needs {KVM}");
        eprintln!("skipped: no {KVM} on this machine");
    }
    found
}

pub struct Guest {
    pub qemu: Child,
    pub input: ChildStdin,
    pub lines: Receiver<String>,
    folder: tempfile::TempDir,
}

impl Guest {
    /// Boots the image, or `None` where there is no QEMU.
    pub fn boot(options: &str, mib: u64, cpus: u32) -> Option<Self> {
        Self::boot_with(options, mib, cpus, &[])
    }

    /// The same, on a machine that has more.
    pub fn boot_with(options: &str, mib: u64, cpus: u32, more: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("workload.elf");
        std::fs::write(&image, ELF).unwrap();
        let mut qemu = Process::new("qemu-system-x86_64");
        if Path::new(KVM).exists() {
            qemu.args(["-accel", "kvm", "-cpu", "host,-arch-capabilities"]);
        } else {
            qemu.args(["-accel", "tcg", "-cpu", "max"]);
        }
        // The small firmware, where it is installed, saves seconds on a KVM that emulates ring 0.
        let firmware = "/usr/share/qemu/qboot.rom";
        if Path::new(firmware).exists() {
            qemu.args(["-bios", firmware]);
        }
        let memory = folder.path().join("memory");
        let backend = format!("memory-backend-file,id=ram,share=on,size={mib}M,mem-path={}", memory.display());
        let spawned = qemu
            .args(["-object", &backend, "-machine", "pc,memory-backend=ram", "-m", &format!("{mib}")])
            .args(["-smp", &cpus.to_string(), "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(more)
            .args(["-append", options, "-kernel"])
            .arg(&image)
            .args(["-monitor", &format!("unix:{},server,nowait", folder.path().join("monitor").display())])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut qemu = match spawned {
            Ok(qemu) => qemu,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "CI needs qemu-system-x86_64");
                eprintln!("skipped: no qemu-system-x86_64 on this machine (package qemu-system-x86)");
                return None;
            }
            Err(error) => panic!("qemu-system-x86_64: {error}"),
        };
        let (input, output) = (qemu.stdin.take().unwrap(), qemu.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Some(Self { qemu, input, lines, folder })
    }

    /// The next line; `None` once the machine has ended.
    pub fn line(&self) -> Option<Line> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(text) => Some(Line::parse(&text).unwrap_or_else(|error| panic!("{text:?}: {error}"))),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the guest said nothing for {PATIENCE:?}"),
        }
    }

    /// The next line that `wanted` takes, passing over others.
    pub fn wait<T>(&self, wanted: impl Fn(Line) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            let line = self.line().expect("the machine ended");
            assert!(!matches!(line, Line::Panic(_)), "{line:?}");
            if let Some(found) = wanted(line.clone()) {
                return found;
            }
            assert!(!matches!(line, Line::Error(_)), "{line:?}");
            assert!(Instant::now() < until, "not said within {PATIENCE:?}");
        }
    }

    pub fn ready(&self) -> Ready {
        self.wait(|line| if let Line::Ready(ready) = line { Some(ready) } else { None })
    }

    pub fn report(&self) -> Report {
        self.wait(|line| if let Line::Report(report) = line { Some(report) } else { None })
    }

    /// Sends a command and waits for its acknowledgement.
    pub fn send(&mut self, command: Command) {
        writeln!(self.input, "{command}").unwrap();
        let text = command.to_string();
        self.wait(|line| matches!(line, Line::Ack(ack) if ack.command == text).then_some(()));
    }

    pub fn check(&mut self) -> CheckedAll {
        self.send(Command::Check);
        self.wait(|line| if let Line::CheckedAll(all) = line { Some(all) } else { None })
    }

    /// Reports until the machine ends.
    pub fn ends(mut self) {
        while self.line().is_some() {}
        assert!(self.qemu.wait().unwrap().success());
    }

    /// QEMU's own console.
    pub fn monitor(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("monitor")).unwrap()
    }

    /// The guest's memory, below the hole.
    pub fn memory(&self) -> std::fs::File {
        OpenOptions::new().read(true).write(true).open(self.folder.path().join("memory")).unwrap()
    }

    pub fn words(&self, page: u64) -> Vec<u64> {
        let mut bytes = vec![0; 4096];
        self.memory().read_exact_at(&mut bytes, page).unwrap();
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
