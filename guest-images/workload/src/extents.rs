//! Guest physical ranges, in order, as a list that needs no heap.
//!
//! Compiled into the image and into the host library.

use core::fmt;

use crate::pattern::PAGE;

/// A range of guest physical memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Extent {
    /// The first byte after the range.
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// The most ranges a list holds: a machine's memory map has two or three that are RAM.
pub const CAPACITY: usize = 16;

/// Up to [`CAPACITY`] ranges; dereferences to a slice. In JSON it is `[[start,len],…]`.
#[derive(Clone, Copy, Default)]
#[cfg_attr(not(workload_image), derive(serde::Deserialize), serde(try_from = "Vec<(u64, u64)>"))]
pub struct Extents {
    ranges: [Extent; CAPACITY],
    count: usize,
}

impl Extents {
    /// Adds a range; one that is empty is left out. Gives it back when the list is full.
    pub fn push(&mut self, extent: Extent) -> Result<(), Extent> {
        if extent.len == 0 {
            return Ok(());
        }
        let slot = self.ranges.get_mut(self.count).ok_or(extent)?;
        *slot = extent;
        self.count += 1;
        Ok(())
    }

    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|extent| extent.len).sum()
    }

    /// Whole pages in all ranges.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE
    }

    /// Guest physical address of page `index`, counted through all ranges.
    #[inline]
    pub fn page(&self, index: u64) -> Option<u64> {
        let mut offset = index * PAGE;
        for extent in self.iter() {
            if offset < extent.len {
                return Some(extent.start + offset);
            }
            offset -= extent.len;
        }
        None
    }
}

impl core::ops::Deref for Extents {
    type Target = [Extent];

    #[inline]
    fn deref(&self) -> &[Extent] {
        self.ranges.get(..self.count).unwrap_or_default()
    }
}

impl PartialEq for Extents {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Extents {}

impl fmt::Debug for Extents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl fmt::Display for Extents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (index, extent) in self.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}[{},{}]", extent.start, extent.len)?;
        }
        f.write_str("]")
    }
}

#[cfg(not(workload_image))]
impl TryFrom<Vec<(u64, u64)>> for Extents {
    type Error = String;

    fn try_from(pairs: Vec<(u64, u64)>) -> Result<Self, String> {
        let mut extents = Self::default();
        for (start, len) in pairs {
            extents.push(Extent { start, len }).map_err(|_| format!("more than {CAPACITY} ranges"))?;
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_through_ranges() {
        let extents = Extents::try_from(vec![(0x20_0000, 0x2000), (0, 0), (1 << 32, 0x1000)]).unwrap();
        assert_eq!(extents.len(), 2);
        assert_eq!(extents.pages(), 3);
        let pages: Vec<_> = (0..4).map(|index| extents.page(index)).collect();
        assert_eq!(pages, [Some(0x20_0000), Some(0x20_1000), Some(1 << 32), None]);
        assert_eq!(extents.to_string(), "[[2097152,8192],[4294967296,4096]]");
    }

    #[test]
    fn a_full_list_says_so() {
        assert!(Extents::try_from(vec![(0, 1); CAPACITY]).is_ok());
        assert!(Extents::try_from(vec![(0, 1); CAPACITY + 1]).is_err());
    }
}
