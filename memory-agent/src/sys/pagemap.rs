//! What page tables say: `/proc/PID/pagemap` and its `PAGEMAP_SCAN`.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use rustix::io::Errno;
use rustix::ioctl::opcode;

use super::last_error;

/// Pages written since they were write-protected asynchronously (include/uapi/linux/fs.h).
pub(crate) const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Pages with an entry that points to memory.
pub(crate) const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Pages whose entry is a swap entry or a marker.
pub(crate) const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// Pages of shared memory that are in memory, mapped or not: with [`Source::File`] alone, on kernels with the project's
/// exact query.
pub(crate) const PAGE_IS_INCORE: u64 = 1 << 9;

/// Asks the file about pages that are not mapped (host-kernel/patches).
const PM_SCAN_EXACT_SWAP: u64 = 1 << 2;
/// Write-protects the pages that match.
const PM_SCAN_WP_MATCHING: u64 = 1;
/// Fails unless asynchronous write protection is registered.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

const PM_PRESENT: u64 = 1 << 63;
const PM_SWAP: u64 = 1 << 62;

/// A run of pages of the same categories (`struct page_region`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageRegion {
    /// First address.
    pub(crate) start: u64,
    /// First address behind.
    pub(crate) end: u64,
    /// Those of the categories asked for that its pages are in.
    pub(crate) categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct PmScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    inverted: u64,
    mask: u64,
    any_of: u64,
    returned: u64,
}

/// Which pages a scan gives back. Those that it does not cost it 2 ns each, the others some 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Pages in any of these categories.
    AnyOf(u64),
    /// Pages that are not in this category.
    NotIn(u64),
}

/// What a scan looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Page tables alone.
    PageTables,
    /// The file too, about pages that page tables do not have.
    File,
}

/// `PAGEMAP_SCAN` (fs/proc/task_mmu.c `do_pagemap_scan`, Linux 6.7): the runs of pages of the addresses that are wanted,
/// with whether they are present and swapped, as many as `regions` holds; and the address up to which was looked.
pub(crate) fn scan<'r>(
    pagemap: &File,
    addresses: &Range<u64>,
    source: Source,
    wanted: Wanted,
    regions: &'r mut [PageRegion],
) -> rustix::io::Result<(&'r [PageRegion], u64)> {
    let (flags, incore) = match source {
        Source::PageTables => (0, 0),
        Source::File => (PM_SCAN_EXACT_SWAP, PAGE_IS_INCORE),
    };
    let mut arguments = PmScan { flags, returned: PAGE_IS_PRESENT | PAGE_IS_SWAPPED | incore, ..PmScan::default() };
    match wanted {
        Wanted::AnyOf(categories) => {
            arguments.any_of = categories;
            arguments.returned &= categories;
        }
        Wanted::NotIn(category) => (arguments.inverted, arguments.mask) = (category, category),
    }
    let count = run(pagemap, addresses, regions, &mut arguments)?;
    Ok((regions.get(..count).ok_or(Errno::OVERFLOW)?, arguments.walk_end))
}

/// Write-protects the pages present that are not, and returns how many those were. The addresses must be registered
/// for asynchronous write protection.
pub(crate) fn protect_written(pagemap: &File, addresses: &Range<u64>) -> rustix::io::Result<u64> {
    let mut regions = [PageRegion::default(); 256];
    let mut start = addresses.start;
    let mut protected = 0;
    while start < addresses.end {
        let both = PAGE_IS_WRITTEN | PAGE_IS_PRESENT;
        let mut arguments = PmScan {
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            mask: both,
            returned: both,
            ..PmScan::default()
        };
        let count = run(pagemap, &(start..addresses.end), &mut regions, &mut arguments)?;
        protected += regions.iter().take(count).map(|r| r.end.saturating_sub(r.start) / 4096).sum::<u64>();
        if arguments.walk_end <= start {
            return Err(Errno::IO);
        }
        start = arguments.walk_end;
    }
    Ok(protected)
}

/// Makes the call; how many of `regions` it filled.
fn run(
    pagemap: &File,
    addresses: &Range<u64>,
    regions: &mut [PageRegion],
    arguments: &mut PmScan,
) -> rustix::io::Result<usize> {
    const PAGEMAP_SCAN: u32 = opcode::read_write::<PmScan>(b'f', 16);
    arguments.size = size_of::<PmScan>() as u64;
    (arguments.start, arguments.end) = (addresses.start, addresses.end);
    arguments.regions = regions.as_mut_ptr().expose_provenance() as u64;
    arguments.regions_len = regions.len() as u64;
    // SAFETY: the kernel writes at most `regions_len` regions, all of whose bits are valid, to memory that is
    // exclusively ours, and `walk_end` of the structure. Write-protecting pages that are registered for it changes
    // nothing that memory reads as: a write lifts the protection in the kernel.
    let count = unsafe {
        libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN as libc::c_ulong, std::ptr::from_mut(arguments))
    };
    usize::try_from(count).map_err(|_| last_error())
}

/// What the entries of a pagemap, one a page (Documentation/admin-guide/mm/pagemap.rst), say as categories:
/// [`PAGE_IS_PRESENT`], [`PAGE_IS_SWAPPED`] or 0. Less than asked for where the process has ended.
pub(crate) fn read(pagemap: &File, first_page: u64, categories: &mut [u64]) -> std::io::Result<usize> {
    let mut bytes = vec![0; size_of_val(categories)];
    let length = pagemap.read_at(&mut bytes, first_page * 8)?;
    let (entries, _) = bytes[..length].as_chunks::<8>();
    for (entry, category) in entries.iter().zip(categories) {
        let entry = u64::from_ne_bytes(*entry);
        *category = match (entry & PM_PRESENT != 0, entry & PM_SWAP != 0) {
            (true, _) => PAGE_IS_PRESENT,
            (false, true) => PAGE_IS_SWAPPED,
            (false, false) => 0,
        };
    }
    Ok(entries.len())
}
