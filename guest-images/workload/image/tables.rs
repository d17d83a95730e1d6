//! Page tables: virtual is physical, ring 3 may read and write everything, 2 MiB pages.
//!
//! The first 4 GiB are laid out by the assembler; what lies above is added by ring 3, as the tables are writable to it
//! like everything else. Accessed and dirty are preset so that walking the tables never writes to them: they would
//! be pages that the guest dirties without meaning to.

use core::arch::global_asm;
use core::ptr;

use crate::extents::Extent;
use crate::layout::LIMIT;

global_asm!(
    r#"
.pushsection .tables, "aw", @progbits
    .balign 4096
.globl page_map
page_map:
    .quad page_directory_pointers + 0x67
    .skip 4096 - 8
.globl page_directory_pointers
page_directory_pointers:
    .quad page_directories + 0x67
    .quad page_directories + 0x1067
    .quad page_directories + 0x2067
    .quad page_directories + 0x3067
    .skip 4096 - 32
.globl page_directories
page_directories:
    .set address, 0
    .rept 2039
    .quad address + 0xe7                # present, writable, user, accessed, dirty, 2 MiB
    .set address, address + 0x200000
    .endr
    .quad 0xfee000ff                    # the local APIC: uncached too
    .set address, address + 0x200000
    .rept 8
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr
.popsection

.pushsection .noinit, "aw", @nobits
    .balign 4096
.globl high_directories
high_directories:
    .skip 62 * 4096                     # one for each GiB from 4 to LIMIT
.popsection
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static mut page_directories: [u64; 2048];
    static mut page_directory_pointers: [u64; 512];
    static mut high_directories: [[u64; 512]; HIGH as usize];
}

const GIB: u64 = 1 << 30;
const HIGH: u64 = LIMIT / GIB - 4;

/// Makes the part of `extent` above 4 GiB reachable. A GiB that is mapped already stays as it is.
pub fn map(extent: &Extent) {
    if extent.len == 0 {
        return;
    }
    for gib in (extent.start / GIB).max(4)..extent.end().min(LIMIT).div_ceil(GIB) {
        // SAFETY: the tables are this processor's until the other is started; `gib` is between 4 and LIMIT / GIB.
        unsafe {
            let pointer = (&raw mut page_directory_pointers).cast::<u64>().add(gib as usize);
            if ptr::read_volatile(pointer) != 0 {
                continue;
            }
            let directory = (&raw mut high_directories).cast::<u64>().add((gib - 4) as usize * 512);
            for index in 0..512 {
                ptr::write_volatile(directory.add(index as usize), (gib * GIB + (index << 21)) | 0xe7);
            }
            // Only now, so that no walk sees a half-written directory. Nothing was mapped here: no flush is due.
            ptr::write_volatile(pointer, directory as u64 | 0x67);
        }
    }
}

/// Makes the part of `extent` below 4 GiB uncached: registers of devices, which nobody has touched yet.
pub fn uncache(extent: &Extent) {
    const NO_CACHE: u64 = 0x18;
    let last = extent.end().min(4 * GIB).div_ceil(2 << 20);
    for index in extent.start >> 21..last {
        // SAFETY: there is an entry for each 2 MiB of the first 4 GiB, and ring 3 may write them.
        unsafe {
            let entry = (&raw mut page_directories).cast::<u64>().add(index as usize);
            ptr::write_volatile(entry, ptr::read_volatile(entry) | NO_CACHE);
        }
    }
}
