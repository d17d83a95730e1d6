//! The local APIC, by memory-mapped I/O from ring 3: one-shot timer and inter-processor interrupts.

use core::hint::spin_loop;
use core::ptr;

use crate::tsc;
use crate::tsc::Frequency;

/// Vector of spurious interrupts.
pub const SPURIOUS: u8 = 0xff;

const BASE: u64 = 0xfee0_0000;
const ID: u64 = 0x20;
const SPURIOUS_VECTOR: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TIMER: u64 = 0x320;
const LINT0: u64 = 0x350;
const LINT1: u64 = 0x360;
const INITIAL_COUNT: u64 = 0x380;
const CURRENT_COUNT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const MASKED: u32 = 1 << 16;

fn write(register: u64, value: u32) {
    // SAFETY: mapped uncached at this address, and not memory.
    unsafe { ptr::write_volatile((BASE + register) as *mut u32, value) };
}

fn read(register: u64) -> u32 {
    // SAFETY: as above.
    unsafe { ptr::read_volatile((BASE + register) as *const u32) }
}

/// The number of this vCPU's APIC.
pub fn id() -> u32 {
    read(ID) >> 24
}

/// Switches this vCPU's APIC on, with its timer on `vector` and everything else masked.
pub fn enable(vector: u8) {
    // First: while the APIC is off, the others stay masked whatever is written to them.
    write(SPURIOUS_VECTOR, 0x100 | u32::from(SPURIOUS));
    write(LINT0, MASKED);
    write(LINT1, MASKED);
    write(DIVIDE, 0xb); // by 1
    write(TIMER, u32::from(vector));
}

/// Starts the timer: one interrupt after so many counts.
pub fn start_timer(counts: u32) {
    write(INITIAL_COUNT, counts);
}

/// How many counts the timer makes in 1024 ticks of the time-stamp counter, measured over 2 ms.
pub fn timer_rate(frequency: Frequency) -> u64 {
    let middle = |before: u64| before + (tsc::now() - before) / 2;
    let before = tsc::now();
    start_timer(u32::MAX);
    let start = middle(before);
    while tsc::now() - start < frequency.ticks(2000) {
        spin_loop();
    }
    let before = tsc::now();
    let left = read(CURRENT_COUNT);
    let end = middle(before);
    start_timer(0);
    (u64::from(u32::MAX - left) * 1024 / (end - start)).max(1)
}

/// Sends INIT to another vCPU.
pub fn send_init(id: u32) {
    write(COMMAND_HIGH, id << 24);
    write(COMMAND_LOW, 0x4500);
}

/// Sends the start-up interrupt to another vCPU, which begins in real mode at `address`.
pub fn send_startup(id: u32, address: u64) {
    write(COMMAND_HIGH, id << 24);
    write(COMMAND_LOW, 0x4600 | (address >> 12) as u32);
}
