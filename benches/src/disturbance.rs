//! What on this host gets into the counts and is not being measured.

use std::collections::BTreeSet;
use std::path::Path;

use harness::disturbance::{damon_is_on, swap_of_others};

/// Sentences about what was seen, each once.
#[derive(Debug, Default)]
pub(crate) struct Disturbances(BTreeSet<String>);

impl Disturbances {
    /// Looks now. `own` is the swap device that belongs to the benchmark.
    pub(crate) fn look(&mut self, own: &Path) {
        for path in swap_of_others(Some(own)) {
            let path = path.display();
            self.0.insert(format!("Other programs may be in the counts: they had swap of their own, on {path}."));
        }
        if damon_is_on() {
            self.0.insert("DAMON is on here: it may page out some pages by itself.".into());
        }
    }

    /// What was seen.
    pub(crate) fn sentences(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}
