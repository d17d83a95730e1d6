//! A control group of this process's own, whose memory is limited.

use harness::group::Group;
use harness::host::may_be_used;

/// A control group that this process is in until this is dropped.
pub(crate) struct LimitedGroup(Group);

impl LimitedGroup {
    /// Makes one below the group that this process is in, and enters it. Pages that it has already stay the old group's.
    pub(crate) fn enter(bytes: u64) -> Result<Self, String> {
        may_be_used()?;
        let group = Group::new().map_err(|e| format!("{e:#}"))?;
        // From here on it is left again also when the rest fails.
        let group = Self(group);
        group.limit(bytes)?;
        group.0.enter().map_err(|e| format!("{e:#}"))?;
        Ok(group)
    }

    /// Changes the limit.
    pub(crate) fn limit(&self, bytes: u64) -> Result<(), String> {
        self.0.limit(bytes).map_err(|e| format!("{e:#}"))
    }

    /// Whether it is of cgroup 2.
    pub(crate) fn is_version_2(&self) -> bool {
        !self.0.is_version_1()
    }

    /// Writes one of its files.
    pub(crate) fn set(&self, name: &str, value: &str) {
        std::fs::write(self.0.directory().join(name), value).unwrap();
    }
}

impl Drop for LimitedGroup {
    fn drop(&mut self) {
        let left = self.0.leave();
        if !std::thread::panicking() {
            left.unwrap();
        }
    }
}
