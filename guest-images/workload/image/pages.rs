//! Writing and comparing whole pages.

use core::ptr;

use crate::pattern::{self, PAGE, WORDS};
use crate::report::Bad;

/// Writes the page at guest physical `address` as of `generation`.
#[inline]
pub fn fill(address: u64, seed: u64, generation: u32) {
    let key = pattern::key(address / PAGE, seed, generation);
    let page = address as *mut u64;
    for index in 0..WORDS {
        // SAFETY: the page is RAM that the layout gave to the workload; one vCPU at a time works on it.
        unsafe { ptr::write(page.add(index), pattern::word(key, index)) };
    }
}

/// Compares the page at guest physical `address` with what it should be as of `generation`.
#[inline]
pub fn compare(address: u64, seed: u64, generation: u32) -> Result<(), Bad> {
    let key = pattern::key(address / PAGE, seed, generation);
    let page = address as *const u64;
    // Each word is read once: one that changes back on the next look would otherwise be found bad, and good when told.
    for index in 0..WORDS {
        // SAFETY: as above.
        let (expected, found) = (pattern::word(key, index), unsafe { ptr::read_volatile(page.add(index)) });
        if found != expected {
            return Err(Bad { page: address, word: index as u32, expected, found });
        }
    }
    Ok(())
}
