//! Fault priority: who works for nobody in particular gives way to a guest that waits for one page after another.
//!
//! Such a page takes a moment of a CPU at each side. Reading, landing and paging out pages that nobody waits for takes the
//! same CPUs for much longer, and what was begun is not taken back. Either side has one of these, which the thread that
//! serves the guest takes; each side's other threads give way before every piece of their work.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A guest that wants nothing for so long has had its burst of pages.
pub(super) const BURST: Duration = Duration::from_micros(500);
/// A guest that never stops waiting for pages does not hold up anybody for longer than this at a time.
const HELD_UP: Duration = Duration::from_millis(50);

/// Whether the guest waits for one page after another, on one side.
#[derive(Debug, Default)]
pub(super) struct FaultPriority {
    state: Mutex<State>,
    given_back: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_taken: bool,
    held_up: usize,
}

impl FaultPriority {
    /// The guest waits for a page.
    pub(super) fn take(&self) {
        self.lock().is_taken = true;
    }

    /// The guest waits for nothing any more.
    pub(super) fn give_back(&self) {
        let mut state = self.lock();
        state.is_taken = false;
        if state.held_up > 0 {
            self.given_back.notify_all();
        }
    }

    /// Waits until the guest waits for nothing, or long enough.
    pub(super) fn give_way(&self) {
        let mut state = self.lock();
        if !state.is_taken {
            return;
        }
        let until = Instant::now() + HELD_UP;
        state.held_up += 1;
        while state.is_taken {
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else { break };
            (state, _) = self.given_back.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        state.held_up -= 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::thread::scope;

    use super::*;

    #[test]
    fn holds_up_who_gives_way_until_it_is_given_back() {
        let fault_priority = FaultPriority::default();
        fault_priority.give_way();
        scope(|scope| {
            let (gone_on, has_gone_on) = channel();
            fault_priority.take();
            let started = Instant::now();
            let fault_priority = &fault_priority;
            scope.spawn(move || {
                fault_priority.give_way();
                gone_on.send(Instant::now()).unwrap();
            });
            while fault_priority.lock().held_up == 0 && started.elapsed() < HELD_UP {}
            assert_eq!(has_gone_on.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
            fault_priority.give_back();
            has_gone_on.recv().unwrap();
        });
        assert_eq!(fault_priority.lock().held_up, 0);
    }

    #[test]
    fn holds_nobody_up_for_ever() {
        let fault_priority = FaultPriority::default();
        fault_priority.take();
        let started = Instant::now();
        fault_priority.give_way();
        assert!(started.elapsed() >= HELD_UP);
    }
}
