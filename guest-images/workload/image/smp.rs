//! Starting the second vCPU and what it then does.

use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::clock::Clock;
use crate::control::{FIGURES, ORDERS};
use crate::memory::Memory;
use crate::options::Options;
use crate::sleep::Sleeper;
use crate::tsc::Frequency;
use crate::worker::{Step, Worker};
use crate::{apic, entry, tsc};

/// What a vCPU needs to know to work.
#[derive(Clone, Copy)]
pub struct Machine {
    pub options: Options,
    pub memory: Memory,
    pub frequency: Frequency,
}

/// The machine as the first vCPU found it; lives on its stack, which it never leaves.
static MACHINE: AtomicPtr<Machine> = AtomicPtr::new(ptr::null_mut());

/// Starts the second vCPU, whose APIC is number 1. False if it is not there within ten seconds: a host that emulates it and is busy takes long.
pub fn start(machine: &Machine) -> bool {
    let wait = |us: u64| {
        let start = tsc::now();
        while tsc::now() - start < machine.frequency.ticks(us) && !FIGURES[1].up.load(Ordering::Acquire) {
            spin_loop();
        }
    };
    MACHINE.store(ptr::from_ref(machine).cast_mut(), Ordering::Release);
    entry::install_trampoline();
    apic::send_init(1);
    wait(10_000);
    apic::send_startup(1, entry::TRAMPOLINE);
    wait(100_000);
    if !FIGURES[1].up.load(Ordering::Acquire) {
        // The second one is for processors that miss the first.
        apic::send_startup(1, entry::TRAMPOLINE);
    }
    wait(10_000_000);
    FIGURES[1].up.load(Ordering::Acquire)
}

/// The second vCPU: works, or sleeps a millisecond at a time.
pub fn second() -> ! {
    let figures = &FIGURES[1];
    // SAFETY: set before this vCPU was started, to something that is never dropped.
    let Machine { options, memory, frequency } = unsafe { *MACHINE.load(Ordering::Acquire) };
    let mut sleeper = Sleeper::new(1, frequency);
    let mut worker = Worker::new(memory, frequency, figures, options.seed, 1, u64::from(options.cpus));
    let mut clock = Clock::new(figures);
    figures.up.store(true, Ordering::Release);
    loop {
        let now = clock.read();
        let pause = ORDERS.pause.load(Ordering::Acquire);
        figures.paused.store(pause, Ordering::Release);
        if pause || matches!(worker.step(now), Step::Ahead) {
            sleeper.sleep(frequency.ticks(1000), &mut clock);
        }
    }
}

/// Tells the second vCPU to keep off the pages, or no longer to.
pub fn set_pause(pause: bool) {
    ORDERS.pause.store(pause, Ordering::Release);
}

/// Whether the second vCPU keeps off the pages, or there is none.
pub fn is_paused() -> bool {
    !FIGURES[1].up.load(Ordering::Acquire) || FIGURES[1].paused.load(Ordering::Acquire)
}
