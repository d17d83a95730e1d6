//! What on this host gets into the counts and is not being measured.

use std::collections::BTreeSet;
use std::fs::{read_dir, read_to_string};
use std::path::Path;

use anyhow::Result;
use memory_agent::active;

/// Where DAMON, the kernel's monitor of memory accesses, is controlled.
const DAMON: &str = "/sys/kernel/mm/damon/admin/kdamonds";

/// Sentences about what was seen, each once.
#[derive(Debug, Default)]
pub(crate) struct Disturbances(BTreeSet<String>);

impl Disturbances {
    /// Looks now. `own` is the swap device that belongs to the benchmark.
    pub(crate) fn look(&mut self, own: &Path) -> Result<()> {
        for device in active()?.into_iter().filter(|device| device.path != own) {
            let path = device.path.display();
            self.0.insert(format!("Other programs may be in the counts: they had swap of their own, on {path}."));
        }
        let monitors = read_dir(DAMON).into_iter().flatten().flatten();
        if monitors
            .filter_map(|entry| read_to_string(entry.path().join("state")).ok())
            .any(|state| state.trim() == "on")
        {
            self.0.insert("DAMON is on here: it may page out some pages by itself.".into());
        }
        Ok(())
    }

    /// What was seen.
    pub(crate) fn sentences(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}
