//! Where in guest RAM everything lies: the image below 2 MiB, then the generation table, working set and cold pages.
//!
//! Compiled into the image, and into the host library so that a machine too small is refused before boot.

use core::fmt;

use crate::block::BLOCK;
use crate::extents::{Extent, Extents};
use crate::options::Options;
use crate::pattern::PAGE;

/// First byte that is not the image's: it is linked at 1 MiB and less than 1 MiB long.
pub const FIRST_FREE: u64 = 2 << 20;

/// First byte that the image cannot map.
pub const LIMIT: u64 = 66 << 30;

/// Room for rings, requests and buffers of all devices: most of it is what a disk has under way.
const FOR_BUFFERS: u64 = 12 << 20;

/// Regions start on this boundary, so that a host that tracks or moves memory in huge pages sees them apart.
const ALIGN: u64 = 2 << 20;

/// Where the guest keeps what it works on. RAM outside is never touched, except the first 2 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// The generation of each page of the working set: a `u32` a page.
    pub table: Extent,
    /// Pages that are checked and rewritten.
    pub working_set: Extents,
    /// Pages that are written once.
    pub cold: Extents,
    /// Pages that are given back to the host, when there is a balloon.
    pub free: Extents,
    /// Rings, requests and buffers of devices, when there are any.
    pub devices: Extent,
}

impl Layout {
    /// Places the regions in `ram`: the ranges of the machine's memory map that are RAM, in ascending order.
    pub fn place(ram: &[Extent], options: &Options) -> Result<Self, LayoutError> {
        let mut free = Free { ram, next: FIRST_FREE };
        let table = free.contiguous(options.working_set / PAGE * 4)?;
        let working_set = free.spread(options.working_set)?;
        let cold = free.spread(options.cold)?;
        let free_pages = free.spread(options.free)?;
        let devices = free.contiguous(for_devices(options))?;
        Ok(Self { table, working_set, cold, free: free_pages, devices })
    }
}

/// What drivers need: rings, requests and buffers, and the generation of each block of the disk, a `u32`.
fn for_devices(options: &Options) -> u64 {
    let table = (options.disk / BLOCK * 4).next_multiple_of(PAGE);
    if options.devices() { FOR_BUFFERS + table } else { 0 }
}

/// Why the regions cannot be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// RAM above 2 MiB cannot hold table, working set and cold pages.
    TooSmall,
    /// The memory map is in too many pieces.
    TooManyRanges,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooSmall => "working set and cold pages do not fit: give the machine more memory or ask for less",
            Self::TooManyRanges => "the memory map is in more than 16 pieces where the regions should go",
        })
    }
}

impl core::error::Error for LayoutError {}

/// RAM not yet handed out: everything from `next` on.
struct Free<'a> {
    ram: &'a [Extent],
    next: u64,
}

impl Free<'_> {
    /// What is left of `extent`, in whole pages and within reach.
    fn rest(&self, extent: &Extent) -> Extent {
        let start = extent.start.max(self.next).next_multiple_of(PAGE);
        let end = extent.start.saturating_add(extent.len).min(LIMIT) / PAGE * PAGE;
        Extent { start, len: end.saturating_sub(start) }
    }

    fn advance(&mut self, end: u64) {
        self.next = end.next_multiple_of(ALIGN);
    }

    fn contiguous(&mut self, len: u64) -> Result<Extent, LayoutError> {
        if len == 0 {
            return Ok(Extent::default());
        }
        let mut ranges = self.ram.iter().map(|extent| self.rest(extent));
        let start = ranges.find(|rest| rest.len >= len).ok_or(LayoutError::TooSmall)?.start;
        self.advance(start + len);
        Ok(Extent { start, len })
    }

    fn spread(&mut self, len: u64) -> Result<Extents, LayoutError> {
        let (mut extents, mut wanted) = (Extents::default(), len);
        for extent in self.ram {
            let rest = self.rest(extent);
            let part = Extent { start: rest.start, len: rest.len.min(wanted) };
            extents.push(part).map_err(|_| LayoutError::TooManyRanges)?;
            wanted -= part.len;
            if wanted == 0 {
                break;
            }
        }
        if wanted > 0 {
            return Err(LayoutError::TooSmall);
        }
        if let Some(last) = extents.last() {
            self.advance(last.end());
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A machine of `bytes` with a hole from 3 to 4 GiB, as this VMM and QEMU lay it out.
    fn machine(bytes: u64) -> Vec<Extent> {
        let low = bytes.min(3 << 30);
        let mut ram =
            vec![Extent { start: 0, len: 0x9_fc00 }, Extent { start: 1 << 20, len: low.saturating_sub(1 << 20) }];
        if bytes > low {
            ram.push(Extent { start: 4 << 30, len: bytes - low });
        }
        ram
    }

    #[test]
    fn goes_around_the_hole() {
        let options = Options { working_set: 1 << 30, cold: 4 << 30, ..Options::default() };
        let layout = Layout::place(&machine(6 << 30), &options).unwrap();
        assert_eq!(layout.table, Extent { start: 2 << 20, len: 1 << 20 });
        assert_eq!(*layout.working_set, [Extent { start: 4 << 20, len: 1 << 30 }]);
        let low = (2 << 30) - (4 << 20);
        let high = (4u64 << 30) - low;
        let expected = [Extent { start: (1 << 30) + (4 << 20), len: low }, Extent { start: 4 << 30, len: high }];
        assert_eq!(*layout.cold, expected);
    }

    #[test]
    fn says_when_it_does_not_fit() {
        let options = Options { working_set: 64 << 20, ..Options::default() };
        assert_eq!(Layout::place(&machine(64 << 20), &options), Err(LayoutError::TooSmall));
        assert_eq!(Layout::place(&[], &options), Err(LayoutError::TooSmall));
        assert!(Layout::place(&[], &Options { working_set: 0, ..options }).is_ok());
    }

    proptest! {
        #[test]
        fn regions_lie_in_ram_and_apart(
            mib in 64u64..65_536, working_set in 0u64..1 << 22, cold in 0u64..1 << 23, free in 0u64..1 << 20,
            disk in 0u64..1 << 20,
        ) {
            let (working_set, cold, free, disk) = (working_set * PAGE, cold * PAGE, free * PAGE, disk * PAGE);
            let ram = machine(mib << 20);
            let options = Options { working_set, cold, free, disk, ..Options::default() };
            let Ok(layout) = Layout::place(&ram, &options) else {
                // Refused only when RAM is really short, by no more than what alignment may cost; what is in one piece may
                // also fail at the hole.
                let devices = for_devices(&options);
                prop_assert!(working_set + cold + working_set / 1024 + free + 2 * devices + (14 << 20) > mib << 20);
                return Ok(());
            };
            prop_assert_eq!(layout.working_set.bytes(), working_set);
            prop_assert_eq!(layout.cold.bytes(), cold);
            prop_assert_eq!(layout.free.bytes(), free);
            prop_assert_eq!(layout.devices.len, for_devices(&options));
            let mut end = FIRST_FREE;
            let spread = [layout.working_set, layout.cold, layout.free].map(|extents| extents.to_vec()).concat();
            let all = [layout.table].into_iter().chain(spread).chain([layout.devices]);
            for extent in all.filter(|extent| extent.len > 0) {
                prop_assert!(extent.start >= end, "{:?} after {:x}", extent, end);
                end = extent.end();
                prop_assert!(ram.iter().any(|r| r.start <= extent.start && extent.end() <= r.end()));
            }
        }
    }
}
