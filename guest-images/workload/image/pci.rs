//! PCI configuration space by ports 0xcf8 and 0xcfc, which every x86 machine with PCI has, and the functions on bus 0.

use crate::port;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// Offset of the command register.
pub const COMMAND: u8 = 0x04;
/// In the command register: answer at the base addresses, and may reach memory.
pub const MEMORY_AND_MASTER: u32 = 0x6;
const CAPABILITIES: u8 = 0x34;
/// In the status register, above the command register: there is a list of capabilities.
const HAS_CAPABILITIES: u32 = 1 << 20;

/// Function 0 of a device on bus 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Function {
    device: u8,
}

impl Function {
    /// The functions that are there.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..32).map(|device| Self { device }).filter(|function| function.read(0) & 0xffff != 0xffff)
    }

    /// Vendor in the lower, device in the upper half.
    pub fn id(self) -> u32 {
        self.read(0)
    }

    fn select(self, offset: u8) {
        port::write_u32(ADDRESS, 1 << 31 | u32::from(self.device) << 11 | u32::from(offset & 0xfc));
    }

    /// The four bytes at `offset`, a multiple of four.
    pub fn read(self, offset: u8) -> u32 {
        self.select(offset);
        port::read_u32(DATA)
    }

    /// Writes four bytes at `offset`, a multiple of four.
    pub fn write(self, offset: u8, value: u32) {
        self.select(offset);
        port::write_u32(DATA, value);
    }

    /// The capabilities: offset and first four bytes of each. A list that does not end is cut.
    pub fn capabilities(self) -> impl Iterator<Item = (u8, u32)> {
        let first = if self.read(COMMAND) & HAS_CAPABILITIES == 0 { 0 } else { self.read(CAPABILITIES) as u8 & 0xfc };
        let next = move |offset: u8| (offset != 0).then(|| (offset, self.read(offset)));
        core::iter::successors(next(first), move |(_, head)| next((head >> 8) as u8 & 0xfc)).take(48)
    }
}
