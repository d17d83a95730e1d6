//! A run's bytes, as numbers. Where they have ended, numbers are 0.

use super::RAM;

pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, fewer at the end.
    pub(super) fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub(super) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `limit`, which is not 0.
    pub(super) fn below(&mut self, limit: u16) -> u16 {
        if limit > 256 { self.u16() % limit } else { u16::from(self.u8()) % limit }
    }

    /// A guest physical address: one of RAM as a rule, or any.
    pub(super) fn address(&mut self) -> u64 {
        match self.u8() {
            0xff => self.u64(),
            0xfe => RAM as u64 - u64::from(self.u8()),
            high => (u64::from(high) << 8 | u64::from(self.u8())) * 2 % RAM as u64,
        }
    }

    /// A length: a short one as a rule, or any.
    pub(super) fn length(&mut self) -> u32 {
        match self.u8() {
            0xff => self.u32(),
            short @ ..0x80 => short.into(),
            long => u32::from(long & 0x7f) << 9,
        }
    }

    /// Bytes of a register: 1, 2, 4 or 8.
    pub(super) fn register(&mut self) -> Vec<u8> {
        let width = 1 << self.below(4);
        self.array::<8>()[..width].to_vec()
    }
}
