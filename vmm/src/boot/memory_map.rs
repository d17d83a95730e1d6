//! The memory map that a guest is given, whichever protocol brings it.

use crate::arch::x86_64::layout::{ACPI_TABLES, ECAM, HIGH_RAM_START, KVM_PAGES, LOW_RAM_END};
use crate::ram::RamLayout;

/// What a range is for. The numbers are those of both protocols: `E820_TYPE_*` (Linux, `arch/x86/include/asm/e820/types.h`)
/// and `XEN_HVM_MEMMAP_TYPE_*` (Xen, `public/arch-x86/hvm/start_info.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// The guest's.
    Ram = 1,
    /// Not to be touched, nor given to a device.
    Reserved = 2,
}

/// One range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    /// First byte.
    pub(super) start: u64,
    /// Bytes.
    pub(super) length: u64,
    /// What it is for.
    pub(super) usage: Use,
}

/// The map of a machine with this RAM, in address order.
pub(super) fn memory_map(ram: &RamLayout) -> Vec<MapEntry> {
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, usage| {
        if end > start {
            map.push(MapEntry { start, length: end - start, usage });
        }
    };
    for region in ram.regions() {
        let end = region.start + region.length;
        if region.start == 0 {
            add(0, end.min(LOW_RAM_END), Use::Ram);
            add(ACPI_TABLES.start, ACPI_TABLES.end, Use::Reserved);
            add(HIGH_RAM_START, end, Use::Ram);
            // A kernel that has not read the ACPI tables yet believes in ECAM only where it is reserved.
            add(ECAM.start, ECAM.end, Use::Reserved);
            add(KVM_PAGES.start, KVM_PAGES.end, Use::Reserved);
        } else {
            add(region.start, end, Use::Ram);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_in_order_without_overlaps_and_all_ram_is_ram(mib in 16_u64..8192) {
            let layout = RamLayout::new(mib << 20);
            let map = memory_map(&layout);
            for pair in map.windows(2) {
                prop_assert!(pair[0].start + pair[0].length <= pair[1].start, "{map:x?}");
            }
            let ram: u64 = map.iter().filter(|entry| entry.usage == Use::Ram).map(|entry| entry.length).sum();
            prop_assert_eq!(ram, (mib << 20) - (HIGH_RAM_START - LOW_RAM_END));
            for entry in map.iter().filter(|entry| entry.usage == Use::Ram) {
                let last = entry.start + entry.length - 1;
                prop_assert!(layout.page_of(entry.start).is_some() && layout.page_of(last).is_some());
            }
        }
    }
}
