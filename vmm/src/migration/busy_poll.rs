//! Busy polling: waiting without falling asleep, for a short time.
//!
//! A thread that sleeps has to be woken, and often a CPU with it, which takes longer than everything else that happens to a
//! page the guest waits for. So whoever serves such pages looks again and again for a while after something has come, and only
//! then goes to sleep, as KVM does before it takes a vCPU that halts off its CPU (`halt_poll_ns`,
//! Documentation/virt/kvm/halt-polling.rst). Whoever else wants the CPU meanwhile gets it.

use std::thread::yield_now;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;

/// For so long after something has come.
const FOR: Duration = Duration::from_micros(200);

/// Whether to stay awake.
#[derive(Debug, Default)]
pub(super) struct BusyPoll {
    until: Option<Instant>,
}

impl BusyPoll {
    /// Something has come: more of it will be looked for without sleeping.
    pub(super) fn stay_awake(&mut self) {
        self.until = Some(Instant::now() + FOR);
    }

    /// Waits until one of these is ready, for `limit` at most; whether one is.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn wait(&mut self, fds: &mut [PollFd<'_>], limit: Option<Duration>) -> std::io::Result<bool> {
        let end = limit.map(|limit| Instant::now() + limit);
        loop {
            if ready(fds, Some(Duration::ZERO))? {
                return Ok(true);
            }
            let now = Instant::now();
            let left = end.map(|end| end.saturating_duration_since(now));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            if self.until.is_none_or(|until| now >= until) {
                self.until = None;
                return ready(fds, left);
            }
            yield_now();
        }
    }
}

fn ready(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> std::io::Result<bool> {
    // Limits here are short.
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    match poll(fds, limit.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        // Whoever waits looks again.
        Err(Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
