//! Swap on a disk, which keeps pages in the swap cache: one that the tests were given, or a loop device over a file.

use std::fs::File;
use std::process::Command;

use harness::host::may_be_used;
use tempfile::NamedTempFile;

/// Names an empty disk that the tests may write to, in place of a loop device.
const DISK: &str = "MEMORY_AGENT_TESTS_DISK";

/// A swap device that goes before all others, until this is dropped.
pub(crate) struct DiskSwap {
    device: String,
    /// Behind a loop device.
    file: Option<NamedTempFile>,
}

impl DiskSwap {
    pub(crate) fn new(bytes: u64) -> Result<Self, String> {
        may_be_used()?;
        let (device, file) = match std::env::var(DISK) {
            Ok(disk) => (disk, None),
            Err(_) => Self::loop_device(bytes)?,
        };
        let swap = Self { device, file };
        // A disk may be larger than asked for; swap is told its size in blocks of 1 KiB.
        run("mkswap", &[&swap.device, &(bytes / 1024).to_string()])?;
        run("swapon", &["--priority", "32767", &swap.device])?;
        Ok(swap)
    }

    fn loop_device(bytes: u64) -> Result<(String, Option<NamedTempFile>), String> {
        let file = NamedTempFile::new_in("/var/tmp").map_err(|e| e.to_string())?;
        // Written, not only sized: swap takes no holes.
        let mut zeros = std::io::Read::take(std::io::repeat(0), bytes);
        std::io::copy(&mut zeros, &mut File::options().write(true).open(file.path()).unwrap())
            .map_err(|e| e.to_string())?;
        let path = file.path().to_str().unwrap().to_owned();
        let device = run("losetup", &["--find", "--show", &path])?;
        Ok((device, Some(file)))
    }

    /// Its path.
    pub(crate) fn device(&self) -> &str {
        &self.device
    }
}

impl Drop for DiskSwap {
    fn drop(&mut self) {
        let off = run("swapoff", &[&self.device]);
        let detached = match self.file {
            Some(_) => run("losetup", &["--detach", &self.device]),
            None => Ok(String::new()),
        };
        if !std::thread::panicking() {
            off.unwrap();
            detached.unwrap();
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    // Where distributions keep them, and some users' PATH does not go.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
