//! The processor's time stamp counter.
#![allow(unsafe_code, reason = "no crate reads it with a safe call")]

use std::arch::x86_64::{_mm_lfence, _rdtsc};

/// Its value, read behind whatever was read before.
pub(super) fn read() -> u64 {
    // SAFETY: both are instructions of every x86-64 processor that touch no memory, and Linux lets programs read the counter.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}
