//! Ways to end.

use core::arch::asm;
use core::hint::spin_loop;

use crate::{port, traps};

/// Powers off: ACPI S5 as QEMU's machines and this VMM have it, and a reset where there is no such port.
pub fn off() -> ! {
    port::write_u16(0x604, 0x2000);
    reset()
}

/// Resets by the keyboard controller.
pub fn reset() -> ! {
    port::write_u8(0x64, 0xfe);
    loop {
        spin_loop();
    }
}

/// Triple fault.
pub fn crash() -> ! {
    traps::remove();
    // SAFETY: the machine ends here.
    unsafe { asm!("ud2", options(noreturn)) }
}
