//! A control group whose processes the kernel takes memory from, again and again.

use std::fs::{read_to_string, write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::group::Group;

/// How much the kernel is to take each time, and how often.
const BYTES: u64 = 16 << 20;
const EVERY: Duration = Duration::from_millis(400);

/// A control group; it goes with this, once its processes have ended.
#[derive(Debug)]
pub struct PressedGroup {
    group: Group,
    over: Arc<AtomicBool>,
    presses: Option<JoinHandle<()>>,
}

impl PressedGroup {
    /// Makes one below the group that this process is in.
    ///
    /// # Errors
    /// When the host has no control groups of memory, or this user may not make any.
    pub fn new() -> Result<Self> {
        let group = Group::new()?;
        let (directory, is_version_1) = (group.directory().to_owned(), group.is_version_1());
        if is_version_1 {
            // While the limit is low for a moment, whoever needs memory waits and is not killed.
            write(directory.join("memory.oom_control"), "1").context("processes there may be killed")?;
        }
        let over: Arc<AtomicBool> = Arc::default();
        let mut pressed = Self { group, over: Arc::clone(&over), presses: None };
        let press = move || {
            while !over.load(Ordering::SeqCst) {
                // In part or not at all, when nothing more can go.
                let _ = if is_version_1 {
                    lower(&directory)
                } else {
                    write(directory.join("memory.reclaim"), BYTES.to_string())
                };
                std::thread::sleep(EVERY);
            }
        };
        pressed.presses = Some(std::thread::Builder::new().name("presses".into()).spawn(press)?);
        Ok(pressed)
    }

    /// What is put in front of a command so that it runs in the group.
    pub fn prefix(&self) -> [String; 4] {
        self.group.prefix()
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
    }
}
