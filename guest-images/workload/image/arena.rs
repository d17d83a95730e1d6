//! Memory for rings, requests and buffers: handed out once, never taken back.

use core::{ptr, slice};

use crate::extents::Extent;
use crate::pattern::PAGE;

/// What is left of the region.
pub struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// All of a region that is RAM, on a page boundary, and nobody else's.
    pub fn new(region: &Extent) -> Self {
        Self { next: region.start, end: region.end() }
    }

    /// Whole pages, zeroed. The layout has room for all that drivers ask for.
    pub fn zeroed(&mut self, bytes: u64) -> u64 {
        let start = self.untouched(bytes);
        // SAFETY: within the region, and handed out just now.
        unsafe { ptr::write_bytes(start as *mut u8, 0, bytes as usize) };
        start
    }

    /// Whole pages, as they are: for buffers that may never be used.
    pub fn untouched(&mut self, bytes: u64) -> u64 {
        let start = self.next;
        self.next = start + bytes.next_multiple_of(PAGE);
        assert!(self.next <= self.end, "the layout leaves too little room for devices");
        start
    }
}

/// Bytes of a buffer that the device does not write at the moment.
pub fn bytes<'a>(address: u64, length: usize) -> &'a mut [u8] {
    // SAFETY: buffers come from the arena and are disjoint; what the device owns at the moment is not looked at.
    unsafe { slice::from_raw_parts_mut(address as *mut u8, length) }
}
