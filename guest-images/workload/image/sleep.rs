//! Sleeping: the local APIC's timer wakes the vCPU from a halt, for which ring 0 is called by a breakpoint, the only
//! software interrupt that every hypervisor passes on.

use core::arch::asm;
use core::sync::atomic::AtomicU8;
use core::sync::atomic::Ordering::Relaxed;

use crate::apic;
use crate::clock::Clock;
use crate::tsc::Frequency;

/// Interrupt vector of the first vCPU's timer; the second has the next.
pub const VECTOR: u8 = 0x40;

/// What the timer's handler adds to the flag.
const TIMER: u8 = 1;

unsafe extern "C" {
    static mut timer_fired: [u8; 2];
}

/// How one vCPU sleeps.
pub struct Sleeper {
    /// What has happened since the last sleep began: [`TIMER`], and 2 for a device.
    fired: &'static AtomicU8,
    /// Timer counts in 1024 ticks.
    rate: u64,
    /// Whether the timer that was started last has still to fire.
    is_ticking: bool,
}

impl Sleeper {
    /// Switches on the APIC of vCPU `cpu`, which is the one that calls this.
    pub fn new(cpu: usize, frequency: Frequency) -> Self {
        apic::enable(VECTOR + cpu as u8);
        // SAFETY: there are two flags and two vCPUs.
        let fired = unsafe { AtomicU8::from_ptr((&raw mut timer_fired).cast::<u8>().add(cpu)) };
        Self { fired, rate: apic::timer_rate(frequency), is_ticking: false }
    }

    /// Sleeps about so many ticks and returns the time.
    pub fn sleep(&mut self, ticks: u64, clock: &mut Clock) -> u64 {
        // No device ended the last sleep. One whose timer was lost, as where a timer ends while the machine is saved, must
        // not be waited for again.
        self.is_ticking = false;
        self.sleep_unless(ticks, clock, || false)
    }

    /// The same, until a device interrupts if that is sooner, and not at all if `pending` finds that something has
    /// happened already.
    pub fn sleep_unless(&mut self, ticks: u64, clock: &mut Clock, pending: impl FnOnce() -> bool) -> u64 {
        let counts = (ticks * self.rate / 1024).clamp(1, u64::from(u32::MAX)) as u32;
        self.is_ticking &= self.fired.swap(0, Relaxed) & TIMER == 0;
        if pending() {
            return clock.read();
        }
        // Starting the timer is an exit: one that runs still, because a device ended the last sleep, is left to run.
        if !self.is_ticking {
            self.is_ticking = true;
            apic::start_timer(counts);
        }
        // SAFETY: the handler looks at the flag and changes nothing else.
        unsafe { asm!("int3", in("rdi") self.fired.as_ptr()) };
        clock.read_after(ticks)
    }
}
