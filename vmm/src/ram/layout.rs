//! Where guest RAM lies in the guest's physical address space.

use std::ops::Range;

use memory_agent::{PAGE_SIZE, Page, PageNumber, PageRange, page_number};
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

page_number! {
    /// A page of guest RAM. They are numbered through all regions without gaps: page 0 is the first page of the first region.
    /// With up to 3 GiB this is the guest frame number; above, it is the frame number less the gap. [`RamLayout`] alone knows
    /// which page of a region's file it is, and where in the guest's physical address space.
    pub struct RamPage;
}

/// All regions, in address order.
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
    pub local: Range<Page>,
    /// The same pages, counted through all of RAM.
    pub pages: Range<RamPage>,
}

impl RegionPart {
    /// Where it begins in the region's file, in bytes.
    pub fn file_offset(&self) -> u64 {
        self.local.start.number() * PAGE_SIZE
    }

    /// Pages of the region, counted through all of RAM.
    pub fn in_ram(&self, local: &Range<Page>) -> Range<RamPage> {
        local.renumbered(self.local.start, self.pages.start)
    }

    /// Pages of RAM, counted from the region's first page; those that are not in this part are left out.
    pub fn in_region(&self, pages: &Range<RamPage>) -> Range<Page> {
        pages.intersection(&self.pages).renumbered(self.pages.start, self.local.start)
    }
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

    /// All pages.
    pub fn all_pages(&self) -> Range<RamPage> {
        RamPage(0).run(self.pages())
    }

    /// The guest physical address of a page, or `None` behind the end of RAM.
    pub fn address_of(&self, page: RamPage) -> Option<u64> {
        let part = self.split(page.run(1)).next()?;
        Some(self.regions[part.region].start + part.file_offset())
    }

    /// The page that holds a guest physical address, or `None` when no RAM is there.
    pub fn page_of(&self, address: u64) -> Option<RamPage> {
        let holds = |r: &RamRegion| address >= r.start && address - r.start < r.length;
        let part = self.parts().find(|part| holds(&self.regions[part.region]))?;
        Some(part.pages.start + (address - self.regions[part.region].start) / PAGE_SIZE)
    }

    /// The pages at guest physical addresses; `None` when these are no whole pages, or not all RAM, or none at all.
    pub fn pages_of(&self, addresses: Range<u64>) -> Option<Range<RamPage>> {
        let Range { start, end } = addresses;
        if start >= end || !start.is_multiple_of(PAGE_SIZE) || !end.is_multiple_of(PAGE_SIZE) {
            return None;
        }
        let pages = self.page_of(start)?..self.page_of(end - 1)? + 1;
        // Else there is a gap within them.
        (pages.byte_count() == end - start).then_some(pages)
    }

    /// Each region as a whole, in order.
    pub fn parts(&self) -> impl Iterator<Item = RegionPart> + '_ {
        let mut first = RamPage(0);
        self.regions.iter().enumerate().map(move |(region, r)| {
            let pages = first.run(r.pages());
            first = pages.end;
            RegionPart { region, local: Page::default().run(r.pages()), pages }
        })
    }

    /// Splits a page range at region borders. What lies behind the end of RAM is left out.
    pub fn split(&self, pages: Range<RamPage>) -> impl Iterator<Item = RegionPart> + '_ {
        self.parts().filter_map(move |whole| {
            let local = whole.in_region(&pages);
            (!local.is_empty()).then(|| RegionPart { pages: whole.in_ram(&local), local, ..whole })
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
        assert_eq!(layout.address_of(RamPage(5)), Some(5 * 4096));
        assert_eq!(layout.page_of((1 << 30) - 1), Some(RamPage(262_143)));
        assert_eq!(layout.page_of(1 << 30), None);
    }

    #[test]
    fn large_machines_leave_the_gap_free() {
        let layout = RamLayout::new(6 << 30);
        assert_eq!(layout.pages(), 6 << 18);
        assert_eq!(layout.address_of(RamPage(3 << 18)), Some(4 << 30));
        assert_eq!(layout.page_of(MMIO_GAP_START), None);
        assert_eq!(layout.page_of(4 << 30), Some(RamPage(3 << 18)));
        assert_eq!(layout.pages_of((4 << 30)..(4 << 30) + 8192), Some(RamPage(3 << 18).run(2)));
        for none in
            [0..0, 0..100, 100..8192, MMIO_GAP_START - 4096..(4 << 30) + 4096, (7 << 30) - 4096..(7 << 30) + 4096]
        {
            assert_eq!(layout.pages_of(none.clone()), None, "{none:x?}");
        }
        let parts: Vec<_> = layout.split(RamPage::range((3 << 18) - 1..(3 << 18) + 2)).collect();
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0].local, (3 << 18) - 1..3 << 18);
        assert_eq!(parts[1].local, 0..2);
        assert_eq!(parts[1].pages, RamPage::range(3 << 18..(3 << 18) + 2));
        assert_eq!(parts[1].in_ram(&(1..2)), RamPage((3 << 18) + 1).run(1));
        assert_eq!(parts[1].in_region(&layout.all_pages()), 0..2);
    }
}
