//! Registers in memory, each access an exit to the host unless the host has said otherwise.

use core::ptr;

macro_rules! access {
    ($($read:ident $write:ident $type:ty),*) => {$(
        /// Reads the register at `address`.
        pub fn $read(address: u64) -> $type {
            // SAFETY: the address is in a device's registers, which are mapped and not memory.
            unsafe { ptr::read_volatile(address as *const $type) }
        }

        /// Writes the register at `address`.
        pub fn $write(address: u64, value: $type) {
            // SAFETY: as above.
            unsafe { ptr::write_volatile(address as *mut $type, value) }
        }
    )*};
}

access!(read_u8 write_u8 u8, read_u16 write_u16 u16, read_u32 write_u32 u32);
