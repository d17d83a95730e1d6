//! Somebody on the network who talks to a guest all the time: numbered frames to it, of which the guest sends each back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::tap::{ETHERTYPE, Interface, TapNetwork};
use anyhow::{Context, Result, ensure};
use workload_guest::frame::{self, Frame, Sequence};

/// Whoever talks: the bridge ([`crate::tap::BRIDGE`]).
const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The first frames may meet a guest that does not listen yet.
const FIRST_WITHIN: Duration = Duration::from_secs(10);
/// So long is waited for what is still on its way.
const LAST_WITHIN: Duration = Duration::from_millis(200);

/// What was said and heard.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    /// Frames that went to the guest.
    pub sent: u64,
    /// Frames that came back.
    pub came: u64,
    /// Of those between the first and the last that came back, the ones that did not.
    pub lost: u64,
    /// Frames that came back twice.
    pub duplicate: u64,
    /// Frames that came back damaged.
    pub corrupt: u64,
    /// The longest time in which none came back.
    pub longest_gap: Duration,
    /// How long ago the last came when nothing more was said.
    pub silent_for: Duration,
}

/// Talks to the guest of this address by the interface `name`, a frame of `length` bytes `every` so often, while `work` does
/// something else.
///
/// # Errors
/// When the network fails, no frame comes back at all, or `work` fails.
pub fn during<T>(
    network: &TapNetwork,
    name: &str,
    guest: [u8; 6],
    (length, every): (usize, Duration),
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Heard)> {
    let interface = network.interface(name, ETHERTYPE)?;
    let (is_over, has_begun) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let talk = scope.spawn(|| {
            let heard = talk(&interface, guest, length, every, &is_over, &has_begun);
            // Whoever waits for the first need not wait for what will not come.
            has_begun.store(true, Ordering::SeqCst);
            heard
        });
        while !has_begun.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let worked = if talk.is_finished() { None } else { Some(work()) };
        is_over.store(true, Ordering::SeqCst);
        let heard = talk.join().ok().context("the thread that talks to the guest panicked")??;
        Ok((worked.context("nobody talks to the guest")??, heard))
    })
}

fn talk(
    interface: &Interface,
    guest: [u8; 6],
    length: usize,
    every: Duration,
    is_over: &AtomicBool,
    has_begun: &AtomicBool,
) -> Result<Heard> {
    let started = Instant::now();
    let (mut sent, mut came, mut corrupt, mut sequence) = (0, 0, 0, Sequence::default());
    let (mut next, mut last, mut longest_gap) = (started, started, Duration::ZERO);
    let mut over_since = None;
    loop {
        let now = Instant::now();
        if is_over.load(Ordering::SeqCst) {
            let since = *over_since.get_or_insert(now);
            if now - since > LAST_WITHIN {
                let Sequence { lost, duplicate, .. } = sequence;
                let silent_for = since.saturating_duration_since(last);
                return Ok(Heard { sent, came, lost, duplicate, corrupt, longest_gap, silent_for });
            }
        } else if now >= next {
            // A tap that is full or has gone takes none: that is what is watched.
            sent += interface.send(&[numbered(guest, sent, length)]).unwrap_or(0) as u64;
            next = now + every;
        }
        while let Some(bytes) = interface.receive()? {
            match frame::read(&bytes) {
                Frame::Ours { sequence: number, echoed: true } => sequence.take(number),
                Frame::Corrupt => {
                    corrupt += 1;
                    continue;
                }
                _ => continue,
            }
            let now = Instant::now();
            if came > 0 {
                longest_gap = longest_gap.max(now - last);
            }
            (came, last) = (came + 1, now);
            has_begun.store(true, Ordering::SeqCst);
        }
        ensure!(came > 0 || started.elapsed() < FIRST_WITHIN, "no frame comes back from the guest");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A frame to the guest.
fn numbered(guest: [u8; 6], sequence: u64, length: usize) -> Vec<u8> {
    let mut frame = vec![sequence as u8; length];
    let sum = frame::sum(&frame[frame::HEAD..]);
    frame::seal(&mut frame, guest, OWN, sequence, sum);
    frame
}
