//! The time-stamp counter: the guest's only clock, as it goes on while the machine is stopped or moved.

use core::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};
use core::ptr;

use crate::report::TscSource;
use crate::{entry, port};

/// The counter now.
#[inline]
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has it, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// How fast the counter runs.
#[derive(Clone, Copy)]
pub struct Frequency {
    /// Ticks a millisecond.
    pub khz: u64,
    /// How that was found.
    pub from: TscSource,
}

impl Frequency {
    /// Asks, in the order of trust: the hypervisor, the processor, the interval timer.
    pub fn find() -> Self {
        let (khz, from) = kvmclock()
            .map(|khz| (khz, TscSource::Kvmclock))
            .or_else(|| cpuid().map(|khz| (khz, TscSource::Cpuid)))
            .or_else(|| pit().map(|khz| (khz, TscSource::Pit)))
            .unwrap_or((1_000_000, TscSource::Assumed));
        Self { khz, from }
    }

    /// Microseconds in this many ticks.
    pub fn us(self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1000 / u128::from(self.khz)) as u64
    }

    /// Ticks in this many microseconds.
    pub fn ticks(self, us: u64) -> u64 {
        us * self.khz / 1000
    }
}

/// From `pvclock_vcpu_time_info`: nanoseconds = (ticks << shift) * mul >> 32.
fn kvmclock() -> Option<u64> {
    let page = entry::kvmclock_page();
    // SAFETY: the page is the image's own; KVM writes it from outside, so the reads are volatile.
    let (mul, shift) =
        unsafe { (ptr::read_volatile(page.add(24).cast::<u32>()), ptr::read_volatile(page.add(28).cast::<i8>())) };
    if mul == 0 {
        return None;
    }
    let khz = (1_000_000u64 << 32) / u64::from(mul);
    let khz = if shift < 0 { khz << -shift } else { khz >> shift };
    (khz != 0).then_some(khz)
}

fn cpuid() -> Option<u64> {
    let last = __cpuid(0).eax;
    if last >= 0x15 {
        let leaf = __cpuid_count(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000);
        }
    }
    let hypervisor = __cpuid(1).ecx >> 31 == 1;
    if hypervisor && (0x4000_0010..0x4000_0100).contains(&__cpuid(0x4000_0000).eax) {
        return Some(u64::from(__cpuid(0x4000_0010).eax)).filter(|khz| *khz != 0);
    }
    None
}

/// Counts for 20 ms on the timer's channel 2, the one that no interrupt hangs on.
fn pit() -> Option<u64> {
    const HERTZ: u64 = 1_193_182;
    const COUNT: u64 = HERTZ / 50;
    let gate = port::read_u8(0x61) & !0x03;
    port::write_u8(0x61, gate | 0x01);
    port::write_u8(0x43, 0xb0); // channel 2, both bytes, mode 0: output rises when the count is done
    port::write_u8(0x42, COUNT as u8);
    port::write_u8(0x42, (COUNT >> 8) as u8);
    let start = now();
    // A counter of 10 GHz would have run for a second.
    while now() - start < 10_000_000_000 {
        if port::read_u8(0x61) & 0x20 != 0 {
            let ticks = now() - start;
            port::write_u8(0x61, gate);
            return Some(ticks * HERTZ / COUNT / 1000).filter(|khz| *khz >= 1000);
        }
    }
    None
}
