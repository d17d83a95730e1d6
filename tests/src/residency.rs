//! Guest RAM as the host sees it, from outside the process, and a sampler that keeps the extremes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memory_agent::{Counts, FileView, counts_of};

use crate::machine::Machine;
use crate::process::Process;

/// The name of guest RAM's memory files.
const NAME: &str = "thermocline-guest-ram";
/// Between two samples.
const EVERY: Duration = Duration::from_millis(2);

/// Guest RAM of a machine of up to 3 GiB. Holds the memory, even when the process has ended, until it is dropped.
#[derive(Debug)]
pub struct GuestMemory(FileView);

impl GuestMemory {
    /// Of this machine, once it has a guest.
    ///
    /// # Errors
    /// When it has none.
    pub fn of(machine: &Machine) -> Result<Self> {
        Self::of_process(&machine.process)
    }

    /// Of the machine that this process has.
    ///
    /// # Errors
    /// When it has none.
    pub fn of_process(process: &Process) -> Result<Self> {
        Ok(Self(FileView::of_process(process.pid(), NAME)?))
    }

    /// What its pages are now.
    ///
    /// # Errors
    /// When the host does not say.
    pub fn counts(&self) -> Result<Counts> {
        Ok(counts_of(&self.0.mapping())?)
    }

    /// Samples the counts until the sampler is asked for what it saw.
    pub fn watch(self) -> Sampler {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut peak = self.counts()?;
            while !stopped.load(Ordering::Relaxed) {
                let now = self.counts()?;
                peak.resident = peak.resident.max(now.resident);
                peak.swapped = peak.swapped.max(now.swapped);
                // The least: holes can only be lost.
                peak.hole = peak.hole.min(now.hole);
                std::thread::sleep(EVERY);
            }
            Ok(peak)
        });
        Sampler { stop, thread }
    }
}

/// Sampling under way.
#[derive(Debug)]
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Counts>>,
}

impl Sampler {
    /// The most resident and swapped pages and the fewest holes seen.
    ///
    /// # Errors
    /// When the host did not say.
    pub fn peak(self) -> Result<Counts> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the sampler panicked")?
    }
}

/// Checks that two numbers of pages differ by no more than `percent` of the second, or a few strays.
///
/// # Errors
/// When they do.
pub fn must_be_near(what: &str, found: u64, expected: u64, percent: u64) -> Result<()> {
    // What the kernel keeps in its per-CPU lists stays behind when a window is paged out.
    const STRAYS: u64 = 64;
    let room = (expected * percent / 100).max(STRAYS);
    ensure!(found.abs_diff(expected) <= room, "{what}: {found} pages, not {expected} within {room}");
    Ok(())
}
