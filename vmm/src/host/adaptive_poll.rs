//! Adaptive polling: waiting without sleeping, for a short time.
//!
//! A thread that sleeps has to be woken, and often a CPU with it, which takes longer than everything else that happens to a
//! page the guest waits for, or to a request to a disk. So whoever serves such looks again and again for a while after something has come, and only
//! then goes to sleep, as KVM does before it takes a vCPU that halts off its CPU (`halt_poll_ns`,
//! Documentation/virt/kvm/halt-polling.rst). Whoever else wants the CPU meanwhile gets it, and then there is no polling for a
//! while.

use std::thread::yield_now;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;

/// For so long after something has come, where a page is what is waited for.
const FOR_PAGES: Duration = Duration::from_micros(200);
/// Giving way takes this long only when somebody else wants the CPU, and not just for a moment.
const WANTED: Duration = Duration::from_micros(100);
/// For so long nothing is polled where that was so: whoever is woken is run sooner than whoever gives way.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Whether to go on polling.
#[derive(Debug)]
pub(crate) struct AdaptivePoll {
    /// For so long after something has come.
    window: Duration,
    until: Option<Instant>,
    not_before: Option<Instant>,
}

impl Default for AdaptivePoll {
    fn default() -> Self {
        Self::new(FOR_PAGES)
    }
}

impl AdaptivePoll {
    /// Polls for so long after something has come.
    pub(crate) fn new(window: Duration) -> Self {
        Self { window, until: None, not_before: None }
    }

    /// Something has come: more of it will be looked for without sleeping.
    pub(crate) fn keep_polling(&mut self) {
        let now = Instant::now();
        self.until = self.not_before.is_none_or(|then| now >= then).then(|| now + self.window);
    }

    /// Looks for as long as it polls, if it does, and for `limit` at most, if there is one, whether one of these is ready.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn look(&mut self, fds: &mut [PollFd<'_>], limit: Option<Duration>) -> std::io::Result<bool> {
        self.look_with(limit, || sleep(fds, Some(Duration::ZERO)))
    }

    /// As [`AdaptivePoll::look`], for whatever `is_ready` says.
    ///
    /// # Errors
    /// Those of `is_ready`.
    pub(crate) fn look_with<E>(
        &mut self,
        limit: Option<Duration>,
        mut is_ready: impl FnMut() -> Result<bool, E>,
    ) -> Result<bool, E> {
        let end = limit.map(|limit| Instant::now() + limit);
        loop {
            let now = Instant::now();
            if end.is_some_and(|end| now >= end) || self.until.is_none_or(|until| now >= until) {
                return Ok(false);
            }
            if is_ready()? {
                return Ok(true);
            }
            yield_now();
            let back = Instant::now();
            if back - now > WANTED {
                (self.until, self.not_before) = (None, Some(back + BACK_OFF));
            }
        }
    }
}

/// Waits until one of these is ready, for `limit` at most; whether one is.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn sleep(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> std::io::Result<bool> {
    // Limits here are short.
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    match poll(fds, limit.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        // Whoever waits looks again.
        Err(Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
