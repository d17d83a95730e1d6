//! Workers without threads, for fuzzing: those that a thread makes once it has [begun](begin) are served in it, to their rest,
//! whenever it [says so](serve). What a run does follows from its input alone, and no run waits for another thread.

use std::cell::RefCell;

/// A worker, one step after the other.
pub(super) trait Step {
    /// Does all that there is to do; whether it is still needed.
    fn step(&mut self) -> bool;
}

thread_local! {
    static WORKERS: RefCell<Option<Vec<Box<dyn Step>>>> = const { RefCell::new(None) };
}

/// Whether workers of this thread are served in it.
pub(super) fn is_on() -> bool {
    WORKERS.with_borrow(Option::is_some)
}

/// One more worker of this thread.
pub(super) fn add(worker: Box<dyn Step>) {
    WORKERS.with_borrow_mut(|workers| workers.get_or_insert_default().push(worker));
}

/// From now on, workers that this thread makes are served in it.
pub(crate) fn begin() {
    WORKERS.set(Some(Vec::new()));
}

/// Has all workers of this thread do what there is to do.
pub(crate) fn serve() {
    WORKERS.with_borrow_mut(|workers| workers.get_or_insert_default().retain_mut(|worker| worker.step()));
}
