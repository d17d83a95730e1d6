//! The threads of one device, told together.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Worker;
use crate::devices::StillBusy;

/// The threads that serve a device's queues: none before it has been activated.
#[derive(Debug, Default)]
pub struct Workers(Mutex<Vec<Worker>>);

impl Workers {
    fn lock(&self) -> MutexGuard<'_, Vec<Worker>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These, at rest, in place of those before, which have been told to end.
    pub fn set(&self, workers: impl IntoIterator<Item = Worker>) {
        let before = std::mem::replace(&mut *self.lock(), workers.into_iter().collect());
        drop(before);
    }

    /// Tells them to end; waits for nothing.
    pub fn end(&self) {
        self.lock().iter().for_each(Worker::end);
    }

    /// Whether one may still touch queues or guest memory, after [`Workers::end`].
    pub fn are_active(&self) -> bool {
        self.lock().iter().any(Worker::is_active)
    }

    /// Has all of them come to rest.
    ///
    /// # Errors
    /// When one is still at work at `deadline`. All have been told.
    pub fn pause(&self, deadline: Instant) -> Result<(), StillBusy> {
        let workers = self.lock();
        workers.iter().for_each(Worker::begin_pause);
        workers.iter().map(|worker| worker.pause(deadline)).fold(Ok(()), Result::and)
    }

    /// Lets them work.
    pub fn resume(&self) {
        self.lock().iter().for_each(Worker::resume);
    }
}
