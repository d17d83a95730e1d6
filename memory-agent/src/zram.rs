//! A zram swap device of one's own, for as long as it is needed.

use std::fs::{File, OpenOptions, read_dir, read_to_string, write};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

const CONTROL: &str = "/sys/class/zram-control";
/// Held while a device is chosen, set up or given back. In a directory where only root can hold it for ever.
const LOCK: &str = "/run/memory-agent-zram.lock";

/// Why there is no zram swap.
#[derive(Debug, Error)]
pub enum ZramError {
    /// The kernel has no zram.
    #[error(
        "this kernel has no zram: run `modprobe zram`, or install the kernel's module package (linux-modules-extra)"
    )]
    NoZram,
    /// Not root.
    #[error("setting up zram swap needs root: run as root, or with CAP_SYS_ADMIN and write access to /sys")]
    NoRights,
    /// A file in `/sys`, `/dev` or `/run` could not be read or written.
    #[error("cannot {what} {path}: {cause}; check `zramctl` and `dmesg`")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// mkswap, swapon or swapoff cannot be started.
    #[error("cannot run {program}: {cause}; install util-linux (mount on Debian), with /sbin or /usr/sbin")]
    NoProgram {
        /// Which.
        program: &'static str,
        /// The system's reason.
        cause: io::Error,
    },
    /// mkswap, swapon or swapoff failed.
    #[error("{program} {device} failed: {message}; check `zramctl`, `swapon --show` and free memory")]
    Program {
        /// Which.
        program: &'static str,
        /// On what.
        device: PathBuf,
        /// What it wrote to standard error.
        message: String,
    },
    /// Others took every device first.
    #[error("no free zram device could be had in {0} attempts: reset one that is not needed with `zramctl --reset`")]
    Contended(u32),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ZramError {
    let path = path.to_owned();
    move |cause| match cause.kind() {
        io::ErrorKind::PermissionDenied => ZramError::NoRights,
        _ => ZramError::Io { what, path, cause },
    }
}

/// A zram device that is used for swap until this is closed or dropped.
///
/// A device that is in use is never touched: the kernel itself refuses a second size for a device that has one
/// (drivers/block/zram/zram_drv.c `disksize_store`), which makes writing the size the claim.
#[derive(Debug)]
pub struct ScopedZram {
    number: u32,
    /// The device was made for this one, and is removed again.
    hot_added: bool,
    swapping: bool,
    open: bool,
}

impl ScopedZram {
    /// Sets up swap of `size_bytes` (before compression, a whole number of pages) with the priority that
    /// `swapon` gives by itself, lower than any explicit one.
    ///
    /// # Errors
    /// [`ZramError`] when the kernel has no zram, this user is not root, or a step fails.
    pub fn new(size_bytes: u64) -> Result<Self, ZramError> {
        Self::set_up(size_bytes, None)
    }

    /// The same with a swap priority from 0 (filled last) to 32767 (filled first).
    ///
    /// # Errors
    /// As for [`ScopedZram::new`].
    pub fn with_priority(size_bytes: u64, priority: u16) -> Result<Self, ZramError> {
        Self::set_up(size_bytes, Some(priority.min(32767)))
    }

    fn set_up(size_bytes: u64, priority: Option<u16>) -> Result<Self, ZramError> {
        let _lock = lock()?;
        // From the claim on, dropping `zram` gives back whatever was reached; the lock is taken for the whole
        // set-up, so the release in case of an error must not take it again.
        let mut zram = Self::claim(size_bytes)?;
        match zram.swap_on(priority) {
            Ok(()) => Ok(zram),
            Err(error) => {
                zram.open = false;
                let _ = zram.release();
                Err(error)
            }
        }
    }

    /// The swap device.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/zram{}", self.number))
    }

    /// Ends swapping (which reads back everything that is swapped there) and gives the device back.
    ///
    /// # Errors
    /// [`ZramError`] when memory does not suffice to read everything back, or a step fails; the device is
    /// left as it is then.
    pub fn close(mut self) -> Result<(), ZramError> {
        self.open = false;
        let _lock = lock()?;
        self.release()
    }

    fn claim(size_bytes: u64) -> Result<Self, ZramError> {
        const ATTEMPTS: u32 = 8;
        for number in existing()? {
            if read_to_string(attribute(number, "disksize")).is_ok_and(|size| size.trim() == "0")
                && try_claim(number, size_bytes)?
            {
                return Ok(Self { number, hot_added: false, swapping: false, open: true });
            }
        }
        let hot_add = Path::new(CONTROL).join("hot_add");
        for _ in 0..ATTEMPTS {
            // Reading this file makes a device and tells its number.
            let number = read_to_string(&hot_add).map_err(io_error("read", &hot_add))?;
            let number = number.trim().parse().map_err(|_| {
                io_error("understand", &hot_add)(io::Error::new(io::ErrorKind::InvalidData, number.clone()))
            })?;
            if try_claim(number, size_bytes)? {
                return Ok(Self { number, hot_added: true, swapping: false, open: true });
            }
        }
        Err(ZramError::Contended(ATTEMPTS))
    }

    fn swap_on(&mut self, priority: Option<u16>) -> Result<(), ZramError> {
        let device = self.path();
        // The node appears with devtmpfs at once, with udev a moment later.
        for _ in 0..100 {
            if device.exists() {
                break;
            }
            sleep(Duration::from_millis(10));
        }
        // Programs, because the format of a swap area is mkswap's to know; swapon takes it from there.
        run("mkswap", &[], &device)?;
        let priority = priority.map(|p| p.to_string());
        let options: Vec<&str> = priority.iter().flat_map(|p| ["--priority", p]).collect();
        run("swapon", &options, &device)?;
        self.swapping = true;
        Ok(())
    }

    fn release(&mut self) -> Result<(), ZramError> {
        if self.swapping {
            run("swapoff", &[], &self.path())?;
            self.swapping = false;
        }
        let reset = attribute(self.number, "reset");
        // udev may have the device open for a moment, and the kernel refuses meanwhile.
        retry_busy(|| write(&reset, "1")).map_err(io_error("write", &reset))?;
        if self.hot_added {
            let remove = Path::new(CONTROL).join("hot_remove");
            retry_busy(|| write(&remove, self.number.to_string())).map_err(io_error("write", &remove))?;
        }
        Ok(())
    }
}

impl Drop for ScopedZram {
    fn drop(&mut self) {
        if self.open {
            // Nobody is left to tell; `close` is for those who want to know.
            let _lock = lock();
            let _ = self.release();
        }
    }
}

fn attribute(number: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/zram{number}/{name}"))
}

/// The numbers of the zram devices there are.
fn existing() -> Result<Vec<u32>, ZramError> {
    if !Path::new(CONTROL).exists() {
        return Err(ZramError::NoZram);
    }
    let blocks = Path::new("/sys/block");
    let entries = read_dir(blocks).map_err(io_error("list", blocks))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut numbers: Vec<u32> = names.filter_map(|name| name.strip_prefix("zram")?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Gives the device a size; `false` if somebody else has, or has removed it.
fn try_claim(number: u32, size_bytes: u64) -> Result<bool, ZramError> {
    let path = attribute(number, "disksize");
    match write(&path, size_bytes.to_string()) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::NotFound) => Ok(false),
        Err(e) => Err(io_error("write", &path)(e)),
    }
}

fn retry_busy(mut step: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    const ATTEMPTS: u32 = 20;
    for _ in 1..ATTEMPTS {
        match step() {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
    step()
}

/// Between a reset and a removal a device looks free to other processes that use this type, and between
/// hot-adding and claiming too; the lock closes both gaps.
fn lock() -> Result<File, ZramError> {
    let path = Path::new(LOCK);
    let options = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = options.map_err(io_error("open", path))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|e| io_error("lock", path)(e.into()))?;
    Ok(file)
}

fn run(program: &'static str, options: &[&str], device: &Path) -> Result<(), ZramError> {
    let mut command = Command::new(program);
    // Root's tools are not on every caller's path.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).args(options).arg(device);
    let output = command.output().map_err(|cause| ZramError::NoProgram { program, cause })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(ZramError::Program { program, device: device.to_owned(), message })
}
