//! A stock Linux guest, on Thermocline or on QEMU, which says on its console what it has checked.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use linux_guest::{ADDRESS_PARAMETER, Said, TEST_PARAMETER};

use crate::machine::{Sandbox, listening};
use crate::process::{Ended, Process, SLOWER, Standard};

/// Names the folder with the files that `cargo xtask guest linux` makes.
pub const GUEST: &str = "THERMOCLINE_LINUX_GUEST";
/// Names QEMU where it is not the installed one.
pub const QEMU: &str = "THERMOCLINE_TESTS_QEMU";
/// From exec to what a check says, whatever it does.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(30 * SLOWER);
/// A panic ends the guest, which then has said so.
const PARAMETERS: &str = "console=ttyS0 panic=-1";

/// The program of QEMU.
pub fn qemu() -> OsString {
    std::env::var_os(QEMU).unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// The files of a guest.
#[derive(Clone, Debug)]
pub struct Image {
    folder: PathBuf,
}

impl Image {
    /// The one that the environment names.
    ///
    /// # Errors
    /// When it names none.
    pub fn get() -> Result<Self> {
        let folder = std::env::var_os(GUEST).with_context(|| {
            format!("no Linux guest: `cargo xtask guest linux` makes one, and {GUEST} names its folder")
        })?;
        let image = Self { folder: folder.into() };
        for name in ["vmlinuz", "initramfs", "disk.ext4"] {
            ensure!(image.file(name).is_file(), "{} has no {name}", image.folder.display());
        }
        Ok(image)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// Who runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// The binary under test.
    Thermocline,
    /// Its peer.
    Qemu,
}

/// What the guest has.
#[derive(Clone, Debug)]
pub struct LinuxMachine {
    /// Who runs it.
    pub monitor: Monitor,
    /// Memory, MiB.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u8,
    /// A copy of the image's disk.
    pub disk: bool,
    /// A tap interface's name, and the guest's address with its bits.
    pub tap: Option<(String, String)>,
    /// A source of randomness.
    pub rng: bool,
    /// A balloon that says what is free.
    pub balloon: bool,
    /// More options of `thermocline run`.
    pub more: Vec<String>,
}

impl LinuxMachine {
    /// With two vCPUs, a serial port, and nothing else.
    pub fn bare(monitor: Monitor) -> Self {
        Self { monitor, memory: 512, cpus: 2, disk: false, tap: None, rng: false, balloon: false, more: vec![] }
    }

    /// With all that the image has drivers for.
    pub fn full(monitor: Monitor, tap: &str, address: &str) -> Self {
        let tap = Some((tap.to_owned(), address.to_owned()));
        Self { disk: true, tap, rng: true, balloon: true, ..Self::bare(monitor) }
    }

    /// Boots it; it does these checks in their order.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn boot(&self, sandbox: &Sandbox, checks: &[&str]) -> Result<LinuxGuest> {
        self.boot_behind(&[], sandbox, checks)
    }

    /// The same behind a command that starts it, such as `ip netns exec NAME`.
    ///
    /// # Errors
    /// As [`LinuxMachine::boot`].
    pub fn boot_behind(&self, prefix: &[&str], sandbox: &Sandbox, checks: &[&str]) -> Result<LinuxGuest> {
        let image = Image::get()?;
        let control = sandbox.path("linux.sock");
        let disk = if self.disk {
            let copy = sandbox.path("disk.ext4");
            std::fs::copy(image.file("disk.ext4"), &copy).context("no room for a disk")?;
            Some(copy)
        } else {
            None
        };
        let mut parameters = format!("{PARAMETERS} {TEST_PARAMETER}{}", checks.join(","));
        if let Some((_, address)) = &self.tap {
            parameters += &format!(" {ADDRESS_PARAMETER}{address}");
        }
        let monitor = match self.monitor {
            Monitor::Thermocline => self.thermocline(sandbox, &image, &parameters, disk.as_deref(), &control)?,
            Monitor::Qemu => self.qemu(&image, &parameters, disk.as_deref(), &control),
        };
        let command: Vec<_> = prefix.iter().map(Into::into).chain(monitor).collect();
        let process = Process::start(&format!("{:?}", self.monitor), &command, Standard::Pipes)?;
        Ok(LinuxGuest { process, control, disk })
    }

    /// Starts a monitor that takes over such a guest, with its disk, and a tap of the same name where the command in front
    /// puts it; the guest that will be there, and the address for `--to`.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn receive_behind(
        &self,
        prefix: &[&str],
        sandbox: &Sandbox,
        listen: &str,
        disk: Option<&Path>,
    ) -> Result<(LinuxGuest, String)> {
        let control = sandbox.path("linux.sock");
        let mut command: Vec<OsString> = prefix.iter().map(Into::into).collect();
        command.extend(sandbox.command(&["receive", "--once", "--listen", listen])?);
        command.extend(["--api-socket".into(), control.clone().into()]);
        command.extend(self.back_ends(disk));
        let process = Process::start("destination", &command, Standard::Pipes)?;
        let address = listening(&process)?;
        Ok((LinuxGuest { process, control, disk: disk.map(Into::into) }, address))
    }

    /// What the host gives the guest's devices, as options of `thermocline`.
    fn back_ends(&self, disk: Option<&Path>) -> Vec<OsString> {
        let mut options: Vec<OsString> = vec![];
        if let Some(disk) = disk {
            options.extend(["--disk".into(), format!("path={}", disk.display()).into()]);
        }
        if let Some((tap, _)) = &self.tap {
            options.extend(["--net".into(), format!("tap={tap}").into()]);
        }
        options
    }

    fn thermocline(
        &self,
        sandbox: &Sandbox,
        image: &Image,
        parameters: &str,
        disk: Option<&Path>,
        control: &Path,
    ) -> Result<Vec<OsString>> {
        let mut command = sandbox.command(&["run", "--cpus", &self.cpus.to_string()])?;
        command.extend(["--memory".into(), format!("{}MiB", self.memory).into()]);
        command.extend(["--api-socket".into(), control.into()]);
        command.extend(["--kernel".into(), image.file("vmlinuz").into()]);
        command.extend(["--initramfs".into(), image.file("initramfs").into()]);
        command.extend(["--cmdline".into(), parameters.into()]);
        command.extend(self.back_ends(disk));
        if self.balloon {
            command.extend(["--balloon".into(), "on".into()]);
        }
        command.extend(self.more.iter().map(Into::into));
        Ok(command)
    }

    fn qemu(&self, image: &Image, parameters: &str, disk: Option<&Path>, control: &Path) -> Vec<OsString> {
        let mut command = vec![qemu()];
        let mut add = |words: &[&str]| command.extend(words.iter().map(Into::into));
        add(&[
            "-accel",
            "kvm",
            "-machine",
            "q35",
            "-cpu",
            "host",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]);
        add(&["-m", &self.memory.to_string(), "-smp", &self.cpus.to_string(), "-serial", "stdio", "-no-reboot"]);
        add(&["-qmp", &format!("unix:{},server=on,wait=off", control.display())]);
        add(&["-append", parameters]);
        if let Some(disk) = disk {
            add(&["-drive", &format!("file={},format=raw,if=none,id=disk0", disk.display())]);
            add(&["-device", "virtio-blk-pci,drive=disk0"]);
        }
        if let Some((tap, _)) = &self.tap {
            add(&["-netdev", &format!("tap,id=net0,ifname={tap},script=no,downscript=no")]);
            add(&["-device", "virtio-net-pci,netdev=net0,romfile="]);
        }
        if self.rng {
            add(&["-device", "virtio-rng-pci"]);
        }
        if self.balloon {
            add(&["-device", "virtio-balloon-pci,free-page-reporting=on"]);
        }
        for (option, name) in [("-kernel", "vmlinuz"), ("-initrd", "initramfs")] {
            command.extend([option.into(), image.file(name).into()]);
        }
        command
    }
}

/// A guest that runs.
#[derive(Debug)]
pub struct LinuxGuest {
    /// Whoever runs it.
    pub process: Process,
    /// Thermocline's API socket, or QEMU's monitor.
    pub control: PathBuf,
    /// Its disk.
    pub disk: Option<PathBuf>,
}

impl LinuxGuest {
    /// Waits until a check has passed; what it found.
    ///
    /// # Errors
    /// When it has failed, or the guest does not come so far.
    pub fn passes(&self, check: &str) -> Result<String> {
        let said = self.hear(check, |said| match said {
            Said::Passed { check: passed, found } if passed == check => Some(Ok(found)),
            Said::Failed { check: failed, why } if failed == check => Some(Err(why)),
            _ => None,
        })?;
        said.map_err(|why| anyhow::anyhow!("in the guest, {check}: {why}"))
    }

    /// Waits until a check has passed a second time, in a machine that has started anew.
    ///
    /// # Errors
    /// When it does not.
    pub fn passes_again(&self, check: &str) -> Result<()> {
        let mut times = 0;
        self.hear(check, |said| {
            times += i32::from(matches!(said, Said::Passed { check: passed, .. } if passed == check));
            (times == 2).then_some(())
        })
    }

    /// Waits until a check says something that `wanted` takes, behind all that it has said.
    ///
    /// # Errors
    /// When it does not, or has failed.
    pub fn says_next<T>(&self, check: &str, mut wanted: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let said = self.hear_from(self.process.stdout.len(), check, |said| match said {
            Said::News { check: of, text } if of == check => wanted(&text).map(Ok),
            Said::Failed { check: failed, why } if failed == check => Some(Err(why)),
            _ => None,
        })?;
        said.map_err(|why| anyhow::anyhow!("in the guest, {check}: {why}"))
    }

    /// Waits until a check says something that begins so.
    ///
    /// # Errors
    /// When it does not.
    pub fn says(&self, check: &str, begin: &str) -> Result<String> {
        self.hear(check, |said| match said {
            Said::News { check: of, text } if of == check && text.starts_with(begin) => Some(text),
            _ => None,
        })
    }

    fn hear<T>(&self, check: &str, wanted: impl FnMut(Said) -> Option<T>) -> Result<T> {
        self.hear_from(0, check, wanted)
    }

    fn hear_from<T>(&self, from: usize, check: &str, mut wanted: impl FnMut(Said) -> Option<T>) -> Result<T> {
        let heard = self.process.stdout.wait_for(from, BOOT_TIMEOUT, |line| wanted(Said::parse(line)?));
        Ok(heard.with_context(|| format!("the guest has said nothing of {check}; {}", self.last_words()))?.1)
    }

    /// The kernel's messages of priority err or worse, by the check `dmesg`, each without what differs between two boots.
    ///
    /// # Errors
    /// When the guest does not come so far.
    pub fn errors(&self) -> Result<Vec<String>> {
        self.passes("dmesg")?;
        let lines = self.process.stdout.lines();
        let errors = lines.iter().filter_map(|line| match Said::parse(line)? {
            Said::News { check, text } if check == "dmesg" => Some(text),
            _ => None,
        });
        Ok(errors.collect())
    }

    /// Types a line on its console.
    ///
    /// # Errors
    /// When it does not read any more.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.process.type_line(line)
    }

    /// Waits until it has switched itself off.
    ///
    /// # Errors
    /// When it does not, or its monitor does not end well.
    pub fn powers_off(&self) -> Result<Ended> {
        let ended = self.process.wait_within(BOOT_TIMEOUT).with_context(|| self.last_words())?;
        ensure!(
            ended.code() == Some(0),
            "its monitor ended with {}: {:?}; {}",
            ended.status,
            ended.stderr,
            self.last_words()
        );
        let panicked = self.process.stdout.lines().into_iter().find(|line| line.contains("Kernel panic"));
        if let Some(panic) = panicked {
            bail!("it did not switch itself off: {panic}");
        }
        Ok(ended)
    }

    /// The end of what it said.
    fn last_words(&self) -> String {
        const SHOWN: usize = 30;
        let lines = self.process.stdout.lines();
        let end = &lines[lines.len().saturating_sub(SHOWN)..];
        format!("its last words:\n{}\n{}", end.join("\n"), self.process.stdout.rest())
    }
}
