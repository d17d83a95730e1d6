//! Frames for a guest: sent to a tap's interface from outside, as quickly as they go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use harness::tap::{Interface, TapNetwork};
use workload_guest::frame::{self, HEAD};

/// Frames a call.
const BATCH: u64 = 64;
const BROADCAST: [u8; 6] = [0xff; 6];
const SOURCE: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Whoever receives comes first where there are not enough CPUs, or what is sent would be thrown away.
const NICER: i32 = 10;

/// The next frame's number. It goes on from one generator to the next: what of the last is still in the tap is no repetition.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A thread that sends until it is dropped.
pub(super) struct Generator {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Generator {
    /// Sends frames of so many bytes to the interface of `tap`.
    pub(super) fn start(network: &Arc<TapNetwork>, tap: &'static str, bytes: u32) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, network) = (Arc::clone(&stop), Arc::clone(network));
        let (sender, opened) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("generator".into()).spawn(move || {
            let interface = network.enter().and_then(|()| Interface::open(tap, false));
            // Without it the figures are worse, not wrong.
            let _ = rustix::process::nice(NICER);
            match interface {
                Ok(interface) => {
                    let _ = sender.send(Ok(()));
                    run(&interface, bytes as usize, &stopped);
                }
                Err(e) => drop(sender.send(Err(e))),
            }
        })?;
        let generator = Self { stop, thread: Some(thread) };
        opened.recv().context("the generator has ended")??;
        Ok(generator)
    }
}

fn run(interface: &Interface, bytes: usize, stop: &AtomicBool) {
    let payload: Vec<u8> = (0..bytes - HEAD).map(|index| index as u8).collect();
    let sum = frame::sum(&payload);
    let mut frames: Vec<_> = (0..BATCH).map(|_| [vec![0; HEAD], payload.clone()].concat()).collect();
    let mut next = NEXT.load(Ordering::Relaxed);
    while !stop.load(Ordering::Relaxed) {
        for (sequence, frame) in (next..).zip(&mut frames) {
            frame::seal(frame, BROADCAST, SOURCE, sequence, sum);
        }
        // There may be no room just now.
        next += interface.send(&frames).unwrap_or_default() as u64;
    }
    NEXT.store(next, Ordering::Relaxed);
}

impl Drop for Generator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
