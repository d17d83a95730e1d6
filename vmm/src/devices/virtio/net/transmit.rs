//! Frames of the guest's to the tap.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use super::receive::MOST;
use super::sys::Scatter;
use super::tap::HEADER;
use crate::devices::virtio::{Chain, DeviceFault, QueueLock};
use crate::host::adaptive_poll::AdaptivePoll;
use crate::ram::GuestRam;

/// Most frames at once, after which others have their turn.
const BATCH: usize = 128;
/// So long is looked for more after something has come, and how often before whoever has something to tell the worker is heard.
const POLL: Duration = Duration::from_micros(50);
const TURNS: u32 = 64;
/// Bytes of an Ethernet header: a frame that is shorter is none.
const ETHERNET_HEADER: usize = 14;

/// Why no more frames are sent.
#[derive(Debug)]
pub(super) enum Stopped {
    /// There is none.
    NoFrame,
    /// The tap takes no more at the moment; the frame stays in the queue.
    Full,
    /// It is others' turn.
    Turn,
    /// The tap has gone, and this frame with it.
    Lost(io::Error),
}

/// One queue of frames.
#[derive(Debug)]
pub(super) struct Transmitter {
    scatter: Scatter,
    chain: Chain,
    adaptive_poll: AdaptivePoll,
}

impl Transmitter {
    pub(super) fn new(ram: &Arc<GuestRam>) -> Self {
        Self { scatter: Scatter::new(ram), chain: Chain::default(), adaptive_poll: AdaptivePoll::new(POLL) }
    }

    /// Sends the frames that are there, or drops them where there is no tap, and looks for more for a short time, unless the worker
    /// is needed elsewhere. Meanwhile the driver need not notify.
    pub(super) fn transmit(
        &mut self,
        queue: &mut QueueLock<'_>,
        tap: Option<BorrowedFd<'_>>,
        is_needed: impl Fn() -> bool,
    ) -> Result<Stopped, DeviceFault> {
        queue.disable_kicks()?;
        for _ in 0..TURNS {
            let stopped = self.batch(queue, tap)?;
            queue.notify()?;
            if !matches!(stopped, Stopped::NoFrame) {
                return Ok(stopped);
            }
            let mut is_needed_now = false;
            let is_more = self.adaptive_poll.look_with(None, || {
                is_needed_now = is_needed();
                Ok(is_needed_now || queue.has_more()?)
            })?;
            if is_more && !is_needed_now {
                continue;
            }
            if !queue.enable_kicks()? {
                return Ok(Stopped::NoFrame);
            }
            if is_needed_now {
                return Ok(Stopped::Turn);
            }
            queue.disable_kicks()?;
        }
        Ok(Stopped::Turn)
    }

    fn batch(&mut self, queue: &mut QueueLock<'_>, tap: Option<BorrowedFd<'_>>) -> Result<Stopped, DeviceFault> {
        for number in 0..BATCH {
            if !queue.pop_quietly_into(&mut self.chain)? {
                if number > 0 {
                    self.adaptive_poll.keep_polling();
                }
                return Ok(Stopped::NoFrame);
            }
            let sent = tap.map_or(Ok(()), |tap| self.send(tap));
            if sent.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
                queue.undo_pop();
                return Ok(Stopped::Full);
            }
            queue.push(self.chain.head, 0)?;
            if let Err(e) = sent {
                return Ok(Stopped::Lost(e));
            }
        }
        Ok(Stopped::Turn)
    }

    /// Sends one. What no network takes is dropped, as is what the host has no memory for and what comes while the tap is down.
    fn send(&mut self, tap: BorrowedFd<'_>) -> io::Result<()> {
        let frame = &self.chain.readable;
        if !(HEADER + ETHERNET_HEADER..=MOST).contains(&(frame.len() as usize)) {
            return Ok(());
        }
        self.scatter.clear();
        if self.scatter.push(frame.parts()).is_err() {
            return Ok(());
        }
        loop {
            match self.scatter.write(tap) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // What a queue says whose interface has been deleted (Linux, tun_chr_write_iter).
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBADFD | libc::EAGAIN)) => return Err(e),
                _ => return Ok(()),
            }
        }
    }
}
