//! The most that two processes had of something while something else went on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::guest_ram::GuestRam;
use crate::process::overhead_of;

/// Between two looks at guest RAM; they take 1 % of a CPU.
const EVERY: Duration = Duration::from_millis(5);
/// Every how many of them memory besides guest RAM is looked at.
const OVERHEAD_EVERY: u32 = 4;

/// The highest samples.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Peaks {
    /// Resident pages of the source's guest RAM.
    pub(crate) source_resident: u64,
    /// Memory of the source besides shared memory, KiB.
    pub(crate) source_overhead_kib: u64,
    /// Memory of the destination besides shared memory, KiB.
    pub(crate) destination_overhead_kib: u64,
}

/// Does `body`, and looks at both processes every few milliseconds meanwhile.
pub(crate) fn during<T>(
    ram: &GuestRam,
    source: u32,
    destination: u32,
    body: impl FnOnce() -> Result<T>,
) -> Result<(T, Peaks)> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut peaks = Peaks::default();
            for look in 0_u32.. {
                peaks.source_resident = peaks.source_resident.max(ram.resident_now()?);
                if look % OVERHEAD_EVERY == 0 {
                    // A process that has ended has none.
                    let overhead = |pid| overhead_of(pid).unwrap_or(0);
                    peaks.source_overhead_kib = peaks.source_overhead_kib.max(overhead(source));
                    peaks.destination_overhead_kib = peaks.destination_overhead_kib.max(overhead(destination));
                }
                if done.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(EVERY);
            }
            Ok(peaks)
        });
        let result = body();
        done.store(true, Ordering::Relaxed);
        let peaks: Result<Peaks> = sampler.join().map_err(|_| anyhow!("the sampler panicked"))?;
        Ok((result?, peaks?))
    })
}
