//! A control group whose processes the kernel takes memory from, again and again.

use std::fs::{create_dir, read_to_string, remove_dir, write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

/// How much the kernel is to take each time, and how often.
const BYTES: u64 = 16 << 20;
const EVERY: Duration = Duration::from_millis(400);

/// A control group; it goes with this, once its processes have ended.
#[derive(Debug)]
pub struct PressedGroup {
    directory: PathBuf,
    over: Arc<AtomicBool>,
    presses: Option<JoinHandle<()>>,
}

impl PressedGroup {
    /// Makes one below the group that this process is in.
    ///
    /// # Errors
    /// When the host has no control groups of memory, or this user may not make any.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let groups = read_to_string("/proc/self/cgroup")?;
        let lines = groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
        let of = |wanted: fn(&str) -> bool| {
            lines.clone().find(|(controllers, _)| wanted(controllers)).map(|(_, path)| path.trim_start_matches('/'))
        };
        let version_1 = of(|controllers| controllers.split(',').any(|c| c == "memory"));
        let parent = match version_1 {
            Some(path) => Path::new("/sys/fs/cgroup/memory").join(path),
            None => Path::new("/sys/fs/cgroup").join(of(str::is_empty).context("memory is not accounted")?),
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = parent.join(format!("thermocline-tests-{}-{number}", std::process::id()));
        create_dir(&directory).with_context(|| format!("no control group at {}", directory.display()))?;
        let mut group = Self { directory: directory.clone(), over: Arc::default(), presses: None };
        if version_1.is_some() {
            // While the limit is low for a moment, whoever needs memory waits and is not killed.
            write(directory.join("memory.oom_control"), "1").context("processes there may be killed")?;
        }
        let (over, is_1) = (Arc::clone(&group.over), version_1.is_some());
        let press = move || {
            while !over.load(Ordering::SeqCst) {
                // In part or not at all, when nothing more can go.
                let _ =
                    if is_1 { lower(&directory) } else { write(directory.join("memory.reclaim"), BYTES.to_string()) };
                std::thread::sleep(EVERY);
            }
        };
        group.presses = Some(std::thread::Builder::new().name("presses".into()).spawn(press)?);
        Ok(group)
    }

    /// What is put in front of a command so that it runs in the group.
    pub fn prefix(&self) -> [String; 4] {
        let script = format!("echo $$ > '{}/cgroup.procs' && exec \"$@\"", self.directory.display());
        ["sh".into(), "-c".into(), script, "sh".into()]
    }
}

/// Version 1 has no way to ask but to lower the limit, which goes up again at once.
fn lower(directory: &Path) -> std::io::Result<()> {
    let limit = directory.join("memory.limit_in_bytes");
    let used: u64 = read_to_string(directory.join("memory.usage_in_bytes"))?.trim().parse().unwrap_or(0);
    let lowered = write(&limit, used.saturating_sub(BYTES).to_string());
    write(&limit, "-1")?;
    lowered
}

impl Drop for PressedGroup {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(presses) = self.presses.take() {
            let _ = presses.join();
        }
        // A process that has just ended may be counted for a moment.
        for _ in 0..100 {
            if remove_dir(&self.directory).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("the control group {} is left behind", self.directory.display());
    }
}
