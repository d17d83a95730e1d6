//! Sleeping: the local APIC's timer wakes the vCPU from a halt, for which ring 0 is called by a breakpoint, the only
//! software interrupt that every hypervisor passes on.

use core::arch::asm;
use core::ptr;

use crate::apic;
use crate::clock::Clock;
use crate::tsc::Frequency;

/// Interrupt vector of the first vCPU's timer; the second has the next.
pub const VECTOR: u8 = 0x40;

unsafe extern "C" {
    static mut timer_fired: [u8; 2];
}

/// How one vCPU sleeps.
pub struct Sleeper {
    fired: *mut u8,
    /// Timer counts in 1024 ticks.
    rate: u64,
}

impl Sleeper {
    /// Switches on the APIC of vCPU `cpu`, which is the one that calls this.
    pub fn new(cpu: usize, frequency: Frequency) -> Self {
        apic::enable(VECTOR + cpu as u8);
        // SAFETY: there are two flags and two vCPUs.
        let fired = unsafe { (&raw mut timer_fired).cast::<u8>().add(cpu) };
        Self { fired, rate: apic::timer_rate(frequency) }
    }

    /// Sleeps about so many ticks and returns the time.
    pub fn sleep(&self, ticks: u64, clock: &mut Clock) -> u64 {
        let counts = (ticks * self.rate / 1024).clamp(1, u64::from(u32::MAX)) as u32;
        // SAFETY: a flag of the image's own that the timer's handler sets; the asm changes nothing else.
        unsafe {
            ptr::write_volatile(self.fired, 0);
            apic::start_timer(counts);
            asm!("int3", in("rdi") self.fired);
        }
        clock.read_after(ticks)
    }
}
