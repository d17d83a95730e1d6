//! Base addresses: where firmware has put a function's registers, or where this puts them when nobody has.

use core::fmt;

use crate::extents::Extent;
use crate::pci::{COMMAND, Function, MEMORY_AND_MASTER};
use crate::tables;

const FIRST: u8 = 0x10;
const IS_PORTS: u32 = 1;
const IS_64_BIT: u32 = 4;

/// Where this puts registers, on machines that keep RAM out of it: this VMM's, and QEMU's up to 3 GiB of RAM.
const WINDOW: Extent = Extent { start: 0xc000_0000, len: 0x2000_0000 };

/// Addresses not yet given away.
pub struct Window {
    next: u64,
}

/// Why a function cannot be reached.
#[derive(Clone, Copy)]
pub enum BarError {
    /// RAM is where registers would go.
    Ram,
    /// There is no room left.
    Full,
}

impl fmt::Display for BarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ram => {
                "devices need the addresses from 3 to 3.5 GiB, where this machine has RAM: give it 3 GiB at most"
            }
            Self::Full => "the devices' registers do not fit into the addresses from 3 to 3.5 GiB",
        })
    }
}

impl Window {
    /// The window, on a machine with this RAM.
    pub fn new(ram: &[Extent]) -> Result<Self, BarError> {
        let overlaps = |extent: &Extent| extent.start < WINDOW.end() && extent.end() > WINDOW.start;
        if ram.iter().any(overlaps) { Err(BarError::Ram) } else { Ok(Self { next: WINDOW.start }) }
    }

    fn take(&mut self, size: u64) -> Result<u64, BarError> {
        let start = self.next.next_multiple_of(size.max(4096));
        if start + size > WINDOW.end() {
            return Err(BarError::Full);
        }
        self.next = start + size;
        Ok(start)
    }
}

/// The addresses of the six registers, 0 for those that are ports or not there. From then on they answer there, and the
/// function may reach memory.
pub fn place(function: Function, window: &mut Window) -> Result<[u64; 6], BarError> {
    let command = function.read(COMMAND);
    let (mut addresses, mut index) = ([0; 6], 0);
    while index < 6 {
        let is_wide = function.read(offset(index)) & (IS_PORTS | IS_64_BIT) == IS_64_BIT;
        addresses[index] = place_one(function, index, is_wide, window)?;
        index += if is_wide { 2 } else { 1 };
    }
    function.write(COMMAND, command & 0xffff | MEMORY_AND_MASTER);
    Ok(addresses)
}

fn offset(index: usize) -> u8 {
    FIRST + index as u8 * 4
}

fn place_one(function: Function, index: usize, is_wide: bool, window: &mut Window) -> Result<u64, BarError> {
    let low = function.read(offset(index));
    let high = if is_wide { function.read(offset(index + 1)) } else { 0 };
    let address = u64::from(high) << 32 | u64::from(low & !0xf);
    if low & IS_PORTS != 0 {
        return Ok(0);
    }
    // The registers do not answer while their size is asked for.
    let command = function.read(COMMAND) & 0xffff;
    function.write(COMMAND, command & !MEMORY_AND_MASTER);
    function.write(offset(index), u32::MAX);
    let size = u64::from((!(function.read(offset(index)) & !0xf)).wrapping_add(1));
    let address = match address {
        _ if size == 0 => 0,
        0 | 0x1_0000_0000.. => window.take(size)?,
        there => there,
    };
    function.write(offset(index), address as u32);
    if is_wide {
        function.write(offset(index + 1), 0);
    }
    function.write(COMMAND, command);
    tables::uncache(&Extent { start: address, len: size });
    Ok(address)
}
