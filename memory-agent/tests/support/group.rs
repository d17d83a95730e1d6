//! A control group of this process's own, whose memory is limited.

use std::fs::{create_dir, read_to_string, remove_dir, write};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long pages may take to be written to a busy disk.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// A control group that this process is in until this is dropped.
pub(crate) struct LimitedGroup {
    parent: PathBuf,
    directory: PathBuf,
    limit: &'static str,
}

impl LimitedGroup {
    /// Makes one below the group that this process is in, and enters it. Pages that it has already stay the old group's.
    pub(crate) fn enter(bytes: u64) -> Result<Self, String> {
        let groups = read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
        let line = |wanted: fn(&str) -> bool| {
            let lines = groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
            lines.clone().find(|(controllers, _)| wanted(controllers)).map(|(_, path)| path.trim_start_matches('/'))
        };
        let (parent, limit) = match line(|controllers| controllers.split(',').any(|c| c == "memory")) {
            Some(path) => (Path::new("/sys/fs/cgroup/memory").join(path), "memory.limit_in_bytes"),
            None => {
                let path = line(str::is_empty).ok_or("memory is not accounted here")?;
                (Path::new("/sys/fs/cgroup").join(path), "memory.max")
            }
        };
        let directory = parent.join(format!("memory-agent-test-{}", std::process::id()));
        create_dir(&directory).map_err(|e| format!("no control group at {}: {e}", directory.display()))?;
        let group = Self { parent, directory, limit };
        group.limit(bytes)?;
        group.put_in(&group.directory)?;
        Ok(group)
    }

    /// Changes the limit. The kernel gives up when pages cannot go that are still being written, and is asked again.
    pub(crate) fn limit(&self, bytes: u64) -> Result<(), String> {
        let path = self.directory.join(self.limit);
        let start = Instant::now();
        loop {
            match write(&path, bytes.to_string()) {
                Err(e) if e.kind() == ErrorKind::ResourceBusy && start.elapsed() < PATIENCE => sleep(PAUSE),
                done => return done.map_err(|e| format!("{}: {e}", path.display())),
            }
        }
    }

    /// Whether it is of cgroup 2.
    pub(crate) fn is_version_2(&self) -> bool {
        self.limit == "memory.max"
    }

    /// Writes one of its files.
    pub(crate) fn set(&self, name: &str, value: &str) {
        write(self.directory.join(name), value).unwrap();
    }

    fn put_in(&self, directory: &Path) -> Result<(), String> {
        let path = directory.join("cgroup.procs");
        write(&path, std::process::id().to_string()).map_err(|e| format!("{}: {e}", path.display()))
    }
}

impl Drop for LimitedGroup {
    fn drop(&mut self) {
        let left = self.put_in(&self.parent);
        let removed = remove_dir(&self.directory);
        if !std::thread::panicking() {
            left.unwrap();
            removed.unwrap();
        }
    }
}
