//! Who tells the network where a guest is that has come from another host, as QEMU does (net/announce.c): switches learn its
//! address at another port by a frame from it, and send its frames the old way until one comes.

use std::io;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::config::MacAddress;

/// How often. One frame may be lost, and the first may come while a switch's port does not forward yet.
pub(super) const ROUNDS: u8 = 5;
/// From the first to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// So much longer is each pause than the one before.
const STEP: Duration = Duration::from_millis(100);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_millis(550);

/// A request of the Reverse Address Resolution Protocol, which every switch hears and nobody answers (RFC 903): 60 bytes, the
/// shortest frame of Ethernet without its checksum.
pub(super) fn frame(mac: MacAddress) -> [u8; 60] {
    let mac = mac.bytes();
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // Reverse ARP; Ethernet, IPv4, lengths of their addresses; request.
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

/// What is waited behind the announcement after which so many are left; nothing behind the last.
fn pause(left: u8) -> Option<Duration> {
    let before = ROUNDS.checked_sub(left)?.checked_sub(1)?;
    (left > 0).then(|| (FIRST_PAUSE + STEP * before.into()).min(LONGEST_PAUSE))
}

/// When to announce a guest: at once when it begins to run here, and then again and again, a little later each time.
#[derive(Debug)]
pub(super) struct Schedule {
    timer: TimerFd,
    due: Instant,
    left: u8,
}

impl Schedule {
    /// Of a guest that has just come and does not run yet.
    ///
    /// # Errors
    /// When the host has no descriptor for the timer.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, due: Instant::now(), left: ROUNDS })
    }

    /// Readable when it may be time for the next.
    pub(super) fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// The timer can be read.
    pub(super) fn take_event(&mut self) {
        // An event says nothing: what counts is when the next is due.
        let _ = self.timer.wait();
    }

    /// Whether it is time for the next; then the timer runs for the one behind it.
    pub(super) fn is_due(&mut self) -> bool {
        let now = Instant::now();
        if self.left == 0 || now < self.due {
            return false;
        }
        self.left -= 1;
        if let Some(pause) = pause(self.left) {
            self.due = now + pause;
            // Fails for no pause of these.
            let _ = self.timer.reset(pause, None);
        }
        true
    }

    /// Whether that was the last.
    pub(super) fn is_over(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_the_one_that_switches_know() {
        let bytes = frame([2, 0, 0, 0, 0, 7].into());
        let head = "ffffffffffff 020000000007 8035 0001 0800 06 04 0003 020000000007 00000000 020000000007 00000000";
        let digits: String = head.split_whitespace().collect();
        let head: Vec<u8> =
            (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect();
        assert_eq!(bytes, *[head, vec![0; 18]].concat());
    }

    #[test]
    fn pauses_grow_to_the_longest() {
        let pauses: Vec<_> = (0..ROUNDS).rev().map_while(pause).map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [50, 150, 250, 350]);
        assert_eq!((pause(ROUNDS), pause(ROUNDS + 1)), (None, None), "before the first there is none");
    }

    #[test]
    fn each_is_due_once_and_none_too_early() {
        let mut schedule = Schedule::new().unwrap();
        let mut at = Vec::new();
        let started = Instant::now();
        while !schedule.is_over() {
            if !at.is_empty() {
                schedule.take_event();
            }
            assert!(schedule.is_due());
            assert!(!schedule.is_due(), "not twice");
            at.push(started.elapsed());
        }
        assert_eq!(at.len(), usize::from(ROUNDS));
        for (pair, pause) in at.windows(2).zip([50, 150, 250, 350]) {
            assert!(pair[1] - pair[0] >= Duration::from_millis(pause), "{at:?}");
        }
    }
}
