//! A control group of one's own.

use std::fs::{create_dir, read_to_string, remove_dir, write};
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How long pages may take to be written to a busy disk.
const TIMEOUT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);
/// How often a group is removed whose last process may still be counted.
const ATTEMPTS: u32 = 100;

/// A control group whose memory is accounted; it goes with this, once its processes have ended.
#[derive(Debug)]
pub struct Group {
    parent: PathBuf,
    directory: PathBuf,
    is_version_1: bool,
}

impl Group {
    /// Makes one below the group that this process is in.
    ///
    /// # Errors
    /// When the host has no control groups of memory, or this user may not make any.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let groups = read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
        let (path, is_version_1) = own_path(&groups).context("memory is not accounted here")?;
        let root = if is_version_1 { "/sys/fs/cgroup/memory" } else { "/sys/fs/cgroup" };
        let parent = Path::new(root).join(path);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = parent.join(format!("thermocline-tests-{}-{number}", std::process::id()));
        create_dir(&directory).with_context(|| format!("no control group at {}", directory.display()))?;
        Ok(Self { parent, directory, is_version_1 })
    }

    /// Whether it is one of version 1.
    pub fn is_version_1(&self) -> bool {
        self.is_version_1
    }

    /// Where it is in the file system.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Limits its memory, in bytes. The kernel gives up when pages cannot go that are still being written, and is asked
    /// again.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn limit(&self, bytes: u64) -> Result<()> {
        let path = self.directory.join(if self.is_version_1 { "memory.limit_in_bytes" } else { "memory.max" });
        let start = Instant::now();
        loop {
            match write(&path, bytes.to_string()) {
                Err(e) if e.kind() == ErrorKind::ResourceBusy && start.elapsed() < TIMEOUT => sleep(PAUSE),
                done => return done.with_context(|| path.display().to_string()),
            }
        }
    }

    /// Puts this process into it. Pages that it has already stay the old group's.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        put_this_process_in(&self.directory)
    }

    /// Puts this process back where it was.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn leave(&self) -> Result<()> {
        put_this_process_in(&self.parent)
    }

    /// What is put in front of a command so that it runs in the group.
    pub fn prefix(&self) -> [String; 4] {
        let script = format!("echo $$ > '{}/cgroup.procs' && exec \"$@\"", self.directory.display());
        ["sh".into(), "-c".into(), script, "sh".into()]
    }
}

fn put_this_process_in(directory: &Path) -> Result<()> {
    let path = directory.join("cgroup.procs");
    write(&path, std::process::id().to_string()).with_context(|| path.display().to_string())
}

/// From the text of `/proc/self/cgroup`: the group that this process's memory is in, below the mount point, and whether it
/// is one of version 1. Memory belongs to one hierarchy only.
fn own_path(groups: &str) -> Option<(&str, bool)> {
    let lines = || groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let version_1 = lines().find(|(controllers, _)| controllers.split(',').any(|c| c == "memory"));
    let (path, is_version_1) = match version_1 {
        Some((_, path)) => (path, true),
        None => (lines().find(|(controllers, _)| controllers.is_empty())?.1, false),
    };
    Some((path.trim_start_matches('/'), is_version_1))
}

impl Drop for Group {
    fn drop(&mut self) {
        let mut last: Option<Error> = None;
        for _ in 0..ATTEMPTS {
            match remove_dir(&self.directory) {
                Ok(()) => return,
                Err(e) => last = Some(e),
            }
            // A process that has just ended may be counted for a moment.
            sleep(PAUSE);
        }
        let why = last.map_or_else(String::new, |e| e.to_string());
        eprintln!("the control group {} is left behind: {why}", self.directory.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_in_either_version() {
        assert_eq!(own_path("4:cpu:/x\n3:memory,hugetlb:/a:b\n0::/c\n"), Some(("a:b", true)));
        assert_eq!(own_path("3:cpu:/\n0::/user.slice/x\n"), Some(("user.slice/x", false)));
        assert_eq!(own_path("0::/\n"), Some(("", false)));
        assert_eq!(own_path("3:cpu:/x\n"), None);
    }
}
