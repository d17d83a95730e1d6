//! Ending everything that a trial has started: when its time is up, or when somebody ends the tests.

use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// A child process, shared with whoever may have to end it.
pub(crate) type SharedChild = Arc<Mutex<Child>>;

static ALIVE: Mutex<Vec<Weak<Mutex<Child>>>> = Mutex::new(Vec::new());

/// A lock whose holder panicked still guards a list or a child that is whole.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn register(child: &SharedChild) {
    let mut alive = locked(&ALIVE);
    alive.retain(|child| child.strong_count() > 0);
    alive.push(Arc::downgrade(child));
}

/// Kills every child that is still there. Each is asked for by its handle, so that no other process can be hit.
pub(crate) fn kill_all() {
    for child in locked(&ALIVE).iter().filter_map(Weak::upgrade) {
        // Fails when it has ended, which is what was wanted.
        let _ = locked(&child).kill();
    }
}

/// From now on SIGINT and SIGTERM end the children and give swap back before they end the tests.
pub(crate) fn on_signals() {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]) else { return };
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            kill_all();
            harness::network::remove_all();
            let _ = crate::swap::close();
            std::process::exit(128 + signal);
        }
    });
}
