//! Exceptions and interrupts. Ring 0 does the least it can: an exception continues in ring 3, which can print.

use core::arch::global_asm;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::report::Panic;
use crate::{apic, control, power, serial, sleep};

global_asm!(
    r#"
.pushsection .text.traps, "ax"
    .balign 16
.globl exception_stubs
exception_stubs:                        # 16 bytes each, for vectors 0 to 31
.irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .balign 16
    .if !((0x60227d00 >> \vector) & 1)
    pushq $0                            # vectors without an error code
    .endif
    pushq $\vector
    jmp exception
.endr

exception:                              # continue in ring 3 at exception_in_ring3(vector, code, rip, cr2)
    cld
    pop %rdi
    pop %rsi
    mov (%rsp), %rdx
    mov %cr2, %rcx
    movq $exception_in_ring3, (%rsp)
    movq $0x33, 8(%rsp)
    movq $0x3202, 16(%rsp)
    movq $exception_stack_end - 8, 24(%rsp)
    movq $0x2b, 32(%rsp)
    iretq

.globl halt_trap
halt_trap:                              # int3: halt until something has set the flag at rdi
    cmpb $0, (%rdi)
    jne 1f
    sti                                 # takes effect after the next instruction: no interrupt can slip in before hlt
halting:
    hlt
halted:
1:  iretq

    .balign 32
.globl device_stubs
device_stubs:                           # 32 bytes each, for what devices signal: count it, and wake the first vCPU
.irp number, 0,1,2,3,4,5
    .balign 32
    incq device_interrupts + 8 * \number
    orb $2, timer_fired
    jmp end_of_interrupt
.endr

.globl timer_0, timer_1
timer_0:
    orb $1, timer_fired
    jmp end_of_interrupt
timer_1:
    orb $1, timer_fired + 1
end_of_interrupt:
    push %rax
    cmpq $halting, 8(%rsp)              # it did slip in, where a nested hypervisor forgets what sti promises: no more halt
    jne 2f
    movq $halted, 8(%rsp)
2:
    mov $0xfee000b0, %eax
    movl $0, (%rax)
    pop %rax
.globl spurious
spurious:
    iretq
.popsection

.pushsection .data.flags, "aw", @progbits
.globl timer_fired, device_interrupts
device_interrupts:
    .skip 6 * 8
timer_fired:
    .byte 0, 0
.popsection

.pushsection .noinit, "aw", @nobits
    .balign 4096
.globl idt
idt:
    .skip 4096
    .skip 16384
exception_stack_end:
.popsection
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static mut idt: [u128; 256];
    static exception_stubs: u8;
    static halt_trap: u8;
    static timer_0: u8;
    static timer_1: u8;
    static spurious: u8;
    static device_stubs: u8;
    static device_interrupts: [u64; 6];
}

/// Interrupts of devices, by the queue that they are of, or what else has changed.
#[derive(Clone, Copy)]
pub enum Signal {
    Disk,
    NetReceive,
    NetTransmit,
    Balloon,
    Random,
    NetConfig,
}

impl Signal {
    /// The interrupt vector.
    pub fn vector(self) -> u8 {
        FIRST_OF_DEVICES + self as u8
    }

    /// How many have come.
    pub fn count(self) -> u64 {
        // SAFETY: a counter for each; the handlers write them, so the read is volatile.
        unsafe { ptr::read_volatile((&raw const device_interrupts).cast::<u64>().add(self as usize)) }
    }
}

/// Vectors behind the timers'.
const FIRST_OF_DEVICES: u8 = 0x50;

const BREAKPOINT: u8 = 3;

/// Fills the interrupt table. Until then an exception is a triple fault.
pub fn install() {
    for vector in 0..=255 {
        set(vector, 0);
    }
    for vector in 0..32u8 {
        let stub = (&raw const exception_stubs as u64) + u64::from(vector) * 16;
        set(vector, gate(stub, 0));
    }
    set(BREAKPOINT, gate(&raw const halt_trap as u64, 3));
    set(sleep::VECTOR, gate(&raw const timer_0 as u64, 0));
    set(sleep::VECTOR + 1, gate(&raw const timer_1 as u64, 0));
    let of_disk_and_net = [Signal::Disk, Signal::NetReceive, Signal::NetTransmit, Signal::NetConfig];
    for signal in of_disk_and_net.into_iter().chain([Signal::Balloon, Signal::Random]) {
        set(signal.vector(), gate(&raw const device_stubs as u64 + signal as u64 * 32, 0));
    }
    set(apic::SPURIOUS, gate(&raw const spurious as u64, 0));
}

/// Empties the interrupt table, so that the next exception is a triple fault.
pub fn remove() {
    for vector in 0..=255 {
        set(vector, 0);
    }
}

fn set(vector: u8, gate: u128) {
    // SAFETY: a gate is written before what it serves can happen, or removed on purpose.
    unsafe { ptr::write_volatile((&raw mut idt).cast::<u128>().add(usize::from(vector)), gate) };
}

/// A 64-bit interrupt gate that the given ring may call.
fn gate(handler: u64, ring: u128) -> u128 {
    let handler = u128::from(handler);
    (handler & 0xffff) | (0x10 << 16) | (0x8e00 << 32) | (ring << 45) | ((handler >> 16) << 48)
}

/// Exceptions so far. The second can only come from telling about the first.
static EXCEPTIONS: AtomicU32 = AtomicU32::new(0);

#[unsafe(no_mangle)]
extern "C" fn exception_in_ring3(vector: u64, code: u64, rip: u64, cr2: u64) -> ! {
    if EXCEPTIONS.fetch_add(1, Ordering::Relaxed) == 0 {
        let cpu = apic::id();
        control::silence();
        serial::say_now(&Panic { vector, code, rip, cr2, cpu });
    }
    power::off()
}
