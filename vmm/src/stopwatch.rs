//! How long a machine's parts take to stop, to become what was saved, and to go on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::record::Name;

/// More than the steps of any machine: one that is stopped again and again forgets what came before.
const MOST: usize = 4096;

/// What is done with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// It comes to rest.
    Stop,
    /// The pages that are still owed are sent, or left to post-copy.
    LastRound,
    /// It is read, to be sent.
    Save,
    /// It is on its way.
    Transfer,
    /// What has come is put in its place.
    Land,
    /// It becomes what was saved.
    Restore,
    /// It goes on; vCPUs, until the first of them enters the guest.
    Resume,
}

/// One part, and how long something took that was done with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub work: Work,
    /// With which part: the id of a device, `vcpus`, `time`, `kvm`, `ram`, `state` or `network`.
    pub part: Name,
    /// How long, microseconds.
    pub us: u64,
}

impl Step {
    pub(crate) fn new(work: Work, part: Name, took: Duration) -> Self {
        Self { work, part, us: took.as_micros() as u64 }
    }
}

/// Measures, for as long as somebody asks. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stopwatch(Arc<Mutex<Vec<Step>>>);

impl Stopwatch {
    fn lock(&self) -> MutexGuard<'_, Vec<Step>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with a part, and measures it.
    pub(crate) fn time<T>(&self, work: Work, part: &Name, done: impl FnOnce() -> T) -> T {
        let since = Instant::now();
        let result = done();
        self.add(Step::new(work, part.clone(), since.elapsed()));
        result
    }

    /// The same with a part that is no device.
    pub(crate) fn time_named<T>(&self, work: Work, part: &str, done: impl FnOnce() -> T) -> T {
        match Name::try_from(part) {
            Ok(part) => self.time(work, &part, done),
            Err(_) => done(),
        }
    }

    fn add(&self, step: Step) {
        let mut steps = self.lock();
        if steps.len() == MOST {
            steps.clear();
        }
        steps.push(step);
    }

    /// What was measured since the last call, in order.
    pub(crate) fn take(&self) -> Vec<Step> {
        std::mem::take(&mut *self.lock())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_come_in_order_and_are_taken_once() {
        let stopwatch = Stopwatch::default();
        assert_eq!(stopwatch.time_named(Work::Stop, "vcpus", || 7), 7);
        stopwatch.time(Work::Stop, &"net0".try_into().unwrap(), || std::thread::sleep(Duration::from_millis(2)));
        let steps = stopwatch.take();
        assert_eq!(steps.iter().map(|step| step.part.as_str()).collect::<Vec<_>>(), ["vcpus", "net0"]);
        assert!(steps[1].us >= 2000);
        assert!(stopwatch.take().is_empty());
    }

    #[test]
    fn nobody_who_never_asks_lets_it_grow() {
        let stopwatch = Stopwatch::default();
        for _ in 0..2 * MOST {
            stopwatch.time_named(Work::Resume, "net0", || ());
        }
        assert_eq!(stopwatch.take().len(), MOST);
    }
}
