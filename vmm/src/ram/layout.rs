//! Where guest RAM lies in the guest's physical address space.

use std::ops::Range;

use memory_agent::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// Start of the range below 4 GiB that belongs to devices (local APIC, I/O APIC, PCI on other machines).
pub const MMIO_GAP_START: u64 = 3 << 30;
/// End of that range.
pub const MMIO_GAP_END: u64 = 4 << 30;

/// The most guest RAM a machine can have, in bytes.
pub const MAX_RAM: u64 = 1 << 40;

/// One stretch of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// First guest physical address, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

impl RamRegion {
    /// Number of 4 KiB pages.
    pub fn pages(&self) -> u64 {
        self.length / PAGE_SIZE
    }
}

/// All regions, in address order.
///
/// Pages of RAM are numbered through all regions without gaps: page 0 is the first page of the first region. With
/// up to 3 GiB this is the guest frame number; above, it is the frame number less the gap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamLayout {
    regions: Vec<RamRegion>,
}

/// A piece of a page range that lies in one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionPart {
    /// Index of the region.
    pub region: usize,
    /// Pages counted from the region's first page.
    pub local: Range<u64>,
    /// The same pages, counted through all of RAM.
    pub pages: Range<u64>,
}

impl RamLayout {
    /// The layout of a machine with `bytes` of RAM: below the MMIO gap first, the rest from 4 GiB on.
    pub fn new(bytes: u64) -> Self {
        let low = bytes.min(MMIO_GAP_START);
        let mut regions = vec![RamRegion { start: 0, length: low }];
        if bytes > low {
            regions.push(RamRegion { start: MMIO_GAP_END, length: bytes - low });
        }
        Self { regions }
    }

    /// The regions in address order.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Number of pages in all regions.
    pub fn pages(&self) -> u64 {
        // A layout that another host offers may say anything.
        self.regions.iter().map(RamRegion::pages).fold(0, u64::saturating_add)
    }

    /// Number of bytes in all regions.
    pub fn bytes(&self) -> u64 {
        self.pages().saturating_mul(PAGE_SIZE)
    }

    /// The guest physical address of a page, or `None` behind the end of RAM.
    pub fn address_of(&self, page: u64) -> Option<u64> {
        let mut first = 0;
        for region in &self.regions {
            if page < first + region.pages() {
                return Some(region.start + (page - first) * PAGE_SIZE);
            }
            first += region.pages();
        }
        None
    }

    /// The page that holds a guest physical address, or `None` when no RAM is there.
    pub fn page_of(&self, address: u64) -> Option<u64> {
        let mut first = 0;
        for region in &self.regions {
            if address >= region.start && address - region.start < region.length {
                return Some(first + (address - region.start) / PAGE_SIZE);
            }
            first += region.pages();
        }
        None
    }

    /// Splits a page range at region borders. What lies behind the end of RAM is left out.
    pub fn split(&self, pages: Range<u64>) -> impl Iterator<Item = RegionPart> + '_ {
        let mut first = 0;
        self.regions.iter().enumerate().filter_map(move |(region, r)| {
            let begin = first;
            first += r.pages();
            let start = pages.start.max(begin);
            let end = pages.end.min(first);
            (start < end).then(|| RegionPart { region, local: start - begin..end - begin, pages: start..end })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_machines_have_one_region() {
        let layout = RamLayout::new(1 << 30);
        assert_eq!(layout.regions(), &[RamRegion { start: 0, length: 1 << 30 }]);
        assert_eq!(layout.address_of(5), Some(5 * 4096));
        assert_eq!(layout.page_of((1 << 30) - 1), Some(262_143));
        assert_eq!(layout.page_of(1 << 30), None);
    }

    #[test]
    fn large_machines_leave_the_gap_free() {
        let layout = RamLayout::new(6 << 30);
        assert_eq!(layout.pages(), 6 << 18);
        assert_eq!(layout.address_of(3 << 18), Some(4 << 30));
        assert_eq!(layout.page_of(MMIO_GAP_START), None);
        assert_eq!(layout.page_of(4 << 30), Some(3 << 18));
        let parts: Vec<_> = layout.split((3 << 18) - 1..(3 << 18) + 2).collect();
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0].local, (3 << 18) - 1..3 << 18);
        assert_eq!(parts[1].local, 0..2);
        assert_eq!(parts[1].pages, 3 << 18..(3 << 18) + 2);
    }
}
