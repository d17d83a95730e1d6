//! Configuration space of a function (PCI Local Bus Specification 3.0, chapter 6): bytes, and which of their bits a guest can
//! write. Sizing a BAR needs nothing more: the bits below its size cannot be written.

use std::ops::Range;

use crate::arch::x86_64::layout::PCI_WINDOW;
use crate::bounded::Block;

/// Bytes of it. Behind them, up to 4 KiB, is extended configuration space, in which there is nothing.
pub const CONFIG_BYTES: usize = 256;

/// Offsets of registers of a header of type 0.
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
const BARS: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The first capability lies behind the header.
const HEADER_END: usize = 0x40;

/// Bits of the command register that can be written: memory space, bus master, interrupt disable.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;
const COMMAND_MEMORY: u16 = 1 << 1;
/// There is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Number of BARs that a header has room for.
const MAX_BARS: usize = 6;

/// What a function is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device, as the vendor counts them.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, sub-class and programming interface, from the top of 24 bits.
    pub class: u32,
    /// Vendor and device of the subsystem.
    pub subsystem: (u16, u16),
}

/// Configuration space of one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// The bits that a guest can write.
    writable: [u8; CONFIG_BYTES],
    /// Size in bytes of each BAR, 0 for those that are not there.
    bars: [u32; MAX_BARS],
    /// Where the next capability goes, and the byte that will point to it.
    free: usize,
    link: usize,
}

impl ConfigSpace {
    /// That of a function without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let (bytes, writable) = ([0; CONFIG_BYTES], [0; CONFIG_BYTES]);
        let mut space = Self { bytes, writable, bars: [0; MAX_BARS], free: HEADER_END, link: CAPABILITIES };
        space.set(VENDOR, &identity.vendor.to_le_bytes());
        space.set(DEVICE, &identity.device.to_le_bytes());
        space.set(REVISION, &[identity.revision]);
        space.set(CLASS, &identity.class.to_le_bytes()[..3]);
        space.set(SUBSYSTEM_VENDOR, &identity.subsystem.0.to_le_bytes());
        space.set(SUBSYSTEM, &identity.subsystem.1.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Neither does anything; operating systems keep notes there.
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, bits: &[u8]) {
        self.writable[offset..offset + bits.len()].copy_from_slice(bits);
    }

    /// The same with a memory BAR of 32 bits, `size` bytes at `address`. `index` is below 6, `size` a power of two of at least 16, and
    /// the address a multiple of it.
    #[must_use]
    pub fn with_bar(mut self, index: usize, size: u32, address: u32) -> Self {
        debug_assert!(index < MAX_BARS && size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        self.bars[index] = size;
        self.set(BARS + 4 * index, &address.to_le_bytes());
        self.allow(BARS + 4 * index, &(!(size - 1)).to_le_bytes());
        self
    }

    /// Adds a capability of this id whose bytes behind the link to the next are `body`, and gives its offset. The bits of `writable`
    /// that are set can be written. All capabilities together have 192 bytes at most.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.free;
        debug_assert!(offset + 2 + body.len() <= CONFIG_BYTES && writable.len() <= body.len());
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.set(self.link, &[offset as u8]);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        self.link = offset + 1;
        self.free = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// Fills `data` from the registers at `offset`; with zeros behind the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes what can be written of `data` to the registers at `offset`.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            let Some(writable) = self.writable.get(at) else { return };
            self.bytes[at] = self.bytes[at] & !writable | byte & writable;
        }
    }

    /// The register of two bytes at `offset`, which is below 255.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The register of four bytes at `offset`, which is below 253.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// Where the guest has put a BAR, if the function decodes it there: memory space is enabled, and all of it lies in the bus's window.
    pub fn decoded(&self, bar: usize) -> Option<Range<u64>> {
        let size = self.bars.get(bar).copied().filter(|size| *size > 0)?;
        let start = u64::from(self.dword(BARS + 4 * bar));
        let range = start..start + u64::from(size);
        let is_inside = PCI_WINDOW.start <= range.start && range.end <= PCI_WINDOW.end;
        (self.word(COMMAND) & COMMAND_MEMORY != 0 && is_inside).then_some(range)
    }

    /// All its bytes.
    pub fn save(&self) -> Block<CONFIG_BYTES> {
        Block(Box::new(self.bytes))
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// When a bit differs that a guest cannot write: it is another function's. The end of a sentence.
    pub fn restore(&mut self, saved: &Block<CONFIG_BYTES>) -> Result<(), String> {
        let differs = |at: &usize| (saved.0[*at] ^ self.bytes[*at]) & !self.writable[*at] != 0;
        match (0..CONFIG_BYTES).find(differs) {
            Some(at) => {
                Err(format!("configuration space has {:#x} at {at:#x}, here it is {:#x}", saved.0[at], self.bytes[at]))
            }
            None => {
                self.bytes = *saved.0;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity =
        Identity { vendor: 0x1af4, device: 0x1044, revision: 1, class: 0x00ff_0012, subsystem: (0x1af4, 0x1100) };
    const SIZE: u32 = 0x8000;
    const AT: u32 = 0xc001_0000;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&IDENTITY).with_bar(0, SIZE, AT).with_bar(2, 16, 0xc000_0000);
        assert_eq!(space.add_capability(9, &[16, 1, 0, 0, 0], &[]), 0x40);
        assert_eq!(space.add_capability(0x11, &[4, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0], &[0, 0xc0]), 0x48);
        space
    }

    /// What the specifications say of every register here, dword by dword: its value after reset, and what can be written.
    fn naive() -> [(u32, u32); 64] {
        let mut registers = [(0, 0); 64];
        registers[0] = (0x1044_1af4, 0);
        registers[1] = (0x0010_0000, 0x0000_0406);
        registers[2] = (0xff00_1201, 0);
        registers[3] = (0, 0x0000_00ff);
        registers[4] = (AT, 0xffff_8000);
        registers[6] = (0xc000_0000, 0xffff_fff0);
        registers[11] = (0x1100_1af4, 0);
        registers[13] = (0x40, 0);
        registers[15] = (0, 0xff);
        registers[16] = (0x0110_4809, 0);
        registers[18] = (0x0004_0011, 0xc000_0000);
        registers[19] = (0x4000, 0);
        registers[20] = (0x5000, 0);
        registers
    }

    fn all(space: &ConfigSpace) -> Vec<u32> {
        (0..64).map(|dword| space.dword(4 * dword)).collect()
    }

    #[test]
    fn capabilities_are_a_list_and_bars_tell_their_size() {
        let mut space = space();
        assert_eq!(all(&space), naive().map(|(value, _)| value));
        for (bar, size) in [(0, SIZE), (1, 0), (2, 16), (3, 0), (5, 0)] {
            let offset = BARS + 4 * bar;
            let before = space.dword(offset);
            space.write(offset, &[0xff; 4]);
            let sized = space.dword(offset);
            assert_eq!(if sized == 0 { 0 } else { !sized + 1 }, size);
            space.write(offset, &before.to_le_bytes());
            assert_eq!(space.dword(offset), before);
        }
    }

    #[test]
    fn a_bar_is_decoded_inside_the_window_and_where_memory_is_enabled() {
        let mut space = space();
        assert_eq!(space.decoded(0), None);
        space.write(COMMAND, &[2]);
        assert_eq!(space.decoded(0), Some(AT.into()..(AT + SIZE).into()));
        assert_eq!((space.decoded(1), space.decoded(7)), (None, None));
        for (address, is_inside) in
            [(0_u32, false), (0xbfff_8000, false), (0xc000_0000, true), (0xdfff_8000, true), (0xe000_0000, false)]
        {
            space.write(BARS, &address.to_le_bytes());
            assert_eq!(space.decoded(0).is_some(), is_inside, "{address:#x}");
        }
        space.write(BARS, &[0xff; 4]);
        assert_eq!(space.decoded(0), None, "the end of the address space while it is sized");
    }

    #[test]
    fn what_is_saved_of_another_function_is_refused() {
        let mut space = space();
        space.write(BARS, &[0xff; 4]);
        let saved = space.save();
        let mut other = super::tests::space();
        other.restore(&saved).unwrap();
        assert_eq!(other, space);
        let mut stranger = ConfigSpace::new(&Identity { device: 0x1042, ..IDENTITY });
        assert!(stranger.restore(&saved).unwrap_err().contains("at 0x2"));
    }

    proptest! {
        #[test]
        fn it_answers_as_registers_of_single_bits(
            accesses in prop::collection::vec((0..270_usize, prop::sample::select(vec![1, 2, 4]), any::<[u8; 4]>()), 0..60)) {
            let mut space = space();
            let mut naive = naive();
            for (offset, width, bytes) in accesses {
                space.write(offset, &bytes[..width]);
                for (at, byte) in (offset..offset + width).zip(bytes) {
                    for bit in 0..8 {
                        let Some((value, writable)) = naive.get_mut(at / 4) else { continue };
                        let place = at % 4 * 8 + bit;
                        if *writable >> place & 1 == 1 {
                            *value = *value & !(1 << place) | u32::from(byte >> bit & 1) << place;
                        }
                    }
                }
                let mut read = [0xaa; 4];
                space.read(offset, &mut read[..width]);
                for (at, byte) in (offset..offset + width).zip(read) {
                    let dword = naive.get(at / 4).map_or(0, |(value, _)| *value);
                    prop_assert_eq!(byte, dword.to_le_bytes()[at % 4]);
                }
            }
            prop_assert_eq!(all(&space), naive.map(|(value, _)| value));
        }
    }
}
