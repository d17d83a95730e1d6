//! A thread that ends with whoever holds it.

use std::io;
use std::thread::JoinHandle;

use crate::host::thread;

/// What a thread does, logged as part of what the one that starts it does.
pub(super) fn in_this_span<T>(body: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let span = tracing::Span::current();
    move || span.in_scope(body)
}

/// A thread, and what ends it: dropping this does that and waits.
pub(super) struct Stoppable {
    stop: Box<dyn FnMut() + Send>,
    thread: Option<JoinHandle<()>>,
}

impl Stoppable {
    /// Starts `body`, which ends soon after `stop` was called.
    pub(super) fn spawn(
        name: &str,
        stop: impl FnMut() + Send + 'static,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let thread = thread(name)?.spawn(in_this_span(body))?;
        Ok(Self { stop: Box::new(stop), thread: Some(thread) })
    }
}

impl Drop for Stoppable {
    fn drop(&mut self) {
        (self.stop)();
        if let Some(thread) = self.thread.take() {
            // A thread here says itself what it could not do.
            let _ = thread.join();
        }
    }
}
