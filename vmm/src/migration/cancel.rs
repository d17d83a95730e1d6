//! Giving a migration up from outside while it waits for its peer.

use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::link::Link;

/// Shared by who migrates and who may give it up.
#[derive(Debug, Default)]
pub struct Cancel {
    given_up: AtomicBool,
    link: Mutex<Option<Link>>,
}

impl Cancel {
    /// Gives up: the migration ends with an error at its next step. Too late once the guest has been handed over.
    pub fn cancel(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        if let Some(link) = self.link().take() {
            link.shutdown(Shutdown::Both);
        }
    }

    /// Whether it has been given up.
    pub fn is_cancelled(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    /// The connection to end, so that nobody waits on it.
    pub(super) fn watch(&self, link: &Link) {
        *self.link() = link.try_clone().ok();
        if self.is_cancelled() {
            link.shutdown(Shutdown::Both);
        }
    }

    /// The migration has ended: its connection is not kept open by whoever may still hold this.
    pub(super) fn forget(&self) {
        *self.link() = None;
    }

    /// From here on it cannot be given up; `false` when it has been already.
    pub(super) fn close(&self) -> bool {
        *self.link() = None;
        !self.is_cancelled()
    }

    fn link(&self) -> std::sync::MutexGuard<'_, Option<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
