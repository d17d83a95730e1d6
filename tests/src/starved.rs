//! A control group whose processes get no more memory now and then.

use std::fs::{read_to_string, write};
use std::time::Duration;

use anyhow::{Context, Result};
use harness::group::Group;

/// A control group; it goes with this, once its processes have ended.
#[derive(Debug)]
pub struct StarvedGroup(Group);

impl StarvedGroup {
    /// Whether there can be one: control groups of version 2 refuse no memory, they end whoever asks for it.
    ///
    /// # Errors
    /// When this user may not make control groups.
    pub fn is_possible() -> Result<bool> {
        Ok(Group::new()?.is_version_1())
    }

    /// Makes one below the group that this process is in.
    ///
    /// # Errors
    /// When there cannot be one, or this user may not make control groups.
    pub fn new() -> Result<Self> {
        let starved = Self(Group::new()?);
        // System calls are refused memory then, and whoever faults waits until there is some.
        starved.set("memory.oom_control", "1")?;
        // And nothing that it has is taken in its place.
        starved.set("memory.swappiness", "0")?;
        Ok(starved)
    }

    /// What is put in front of a command so that it runs in the group.
    pub fn prefix(&self) -> [String; 4] {
        self.0.prefix()
    }

    /// For so long nobody there gets more memory than it has. Gives how often the kernel has refused some so far.
    ///
    /// # Errors
    /// When the kernel refuses the limit or does not say.
    pub fn starve(&self, time: Duration) -> Result<u64> {
        let used = self.get("memory.usage_in_bytes")?;
        // Refused when more has been taken meanwhile: then this once nobody starves.
        let _ = self.set("memory.limit_in_bytes", &used);
        std::thread::sleep(time);
        self.set("memory.limit_in_bytes", "-1")?;
        self.get("memory.failcnt")?.parse().context("memory.failcnt")
    }

    fn get(&self, name: &str) -> Result<String> {
        let path = self.0.directory().join(name);
        Ok(read_to_string(&path).with_context(|| path.display().to_string())?.trim().to_owned())
    }

    fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = self.0.directory().join(name);
        write(&path, value).with_context(|| path.display().to_string())
    }
}
