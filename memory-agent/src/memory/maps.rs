//! `/proc/PID/maps`, as far as shared memory is concerned.

use std::ops::Range;

use rustix::fs::{Stat, makedev};

/// Which file: numbers of files are their file system's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    pub(super) device: u64,
    inode: u64,
}

impl FileId {
    pub(super) fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }

    /// As `maps` has it: `MAJOR:MINOR` in hexadecimal, and the inode.
    fn parse(device: &str, inode: &str) -> Option<Self> {
        let (major, minor) = device.split_once(':')?;
        let hex = |text| u32::from_str_radix(text, 16).ok();
        Some(Self { device: makedev(hex(major)?, hex(minor)?), inode: inode.parse().ok()? })
    }
}

/// A shared mapping of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SharedFileMapping {
    pub(super) addresses: Range<u64>,
    pub(super) writable: bool,
    /// Of the first byte in the file.
    pub(super) offset: u64,
    pub(super) file: FileId,
    pub(super) name: String,
}

impl SharedFileMapping {
    fn parse(line: &str) -> Option<Self> {
        let mut rest = line;
        let mut field = || {
            let (field, behind) = rest.split_once(' ')?;
            rest = behind.trim_start();
            Some(field)
        };
        let (start, end) = field()?.split_once('-')?;
        let permissions = field()?;
        let offset = field()?;
        let file = FileId::parse(field()?, field()?)?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let mapping = Self {
            addresses: hex(start)?..hex(end)?,
            writable: permissions.as_bytes().get(1) == Some(&b'w'),
            offset: hex(offset)?,
            file,
            name: rest.strip_suffix(" (deleted)").unwrap_or(rest).to_owned(),
        };
        (permissions.as_bytes().get(3) == Some(&b's')).then_some(mapping)
    }

    /// Bytes.
    pub(super) fn length(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    /// Offsets in the file.
    pub(super) fn offsets(&self) -> Range<u64> {
        self.offset..self.offset + self.length()
    }

    /// Whether `next` goes on where this ends, in memory and in the file.
    fn goes_on_with(&self, next: &Self) -> bool {
        self.file == next.file
            && self.writable == next.writable
            && self.addresses.end == next.addresses.start
            && self.offsets().end == next.offset
    }

    /// Whether all that `part` maps is mapped by this in the same way.
    pub(super) fn has(&self, part: &Self) -> bool {
        self.file == part.file
            && self.addresses.start <= part.addresses.start
            && part.addresses.end <= self.addresses.end
            && part.addresses.start - self.addresses.start == part.offset.wrapping_sub(self.offset)
    }
}

/// The shared file mappings that the text lists, those that adjoin joined.
pub(super) fn shared_mappings(maps: &str) -> Vec<SharedFileMapping> {
    let mut found: Vec<SharedFileMapping> = Vec::new();
    for mapping in maps.lines().filter_map(SharedFileMapping::parse) {
        match found.last_mut() {
            Some(last) if last.goes_on_with(&mapping) => last.addresses.end = mapping.addresses.end,
            _ => found.push(mapping),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAPS: &str = "\
00400000-00401000 r-xp 00000000 08:01 7 /bin/a b
7000-9000 rw-s 00000000 00:01 9                          /memfd:ram (deleted)
9000-a000 rw-s 00002000 00:01 9                          /memfd:ram (deleted)
a000-b000 r--s 00003000 00:01 9                          /memfd:ram (deleted)
c000-d000 rw-s 00003000 00:01 9                          /memfd:ram (deleted)
e000-f000 rw-p 00000000 00:00 0
";

    #[test]
    fn mappings_that_adjoin_are_one() {
        let found = shared_mappings(MAPS);
        let places: Vec<_> = found.iter().map(|m| (m.addresses.clone(), m.offset, m.writable)).collect();
        assert_eq!(
            places,
            [(0x7000..0xa000, 0, true), (0xa000..0xb000, 0x3000, false), (0xc000..0xd000, 0x3000, true)]
        );
        let file = FileId { device: 1, inode: 9 };
        assert!(found.iter().all(|m| m.name == "/memfd:ram" && m.file == file));
    }

    #[test]
    fn a_device_is_read_as_stat_has_it() {
        let stat = rustix::fs::stat("/proc/self/exe").unwrap();
        let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
        let device = format!("{major:02x}:{minor:02x}");
        assert_eq!(FileId::parse(&device, &stat.st_ino.to_string()), Some(FileId::of(&stat)));
        assert_eq!(FileId::parse("1", "2"), None);
        assert_eq!(FileId::parse("0:g", "2"), None);
    }

    #[test]
    fn a_part_is_found_where_it_was() {
        let found = shared_mappings(MAPS);
        let part = SharedFileMapping { addresses: 0x8000..0xa000, offset: 0x1000, ..found[0].clone() };
        assert!(found[0].has(&part) && !found[1].has(&part));
        let moved = SharedFileMapping { offset: 0x2000, ..part.clone() };
        let other = SharedFileMapping { file: FileId { device: 1, inode: 10 }, ..part.clone() };
        let elsewhere = SharedFileMapping { file: FileId { device: 2, inode: 9 }, ..part };
        assert!(!found[0].has(&elsewhere));
        assert!(!found[0].has(&moved) && !found[0].has(&other));
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "[0-9a-f :./rwsp\n-]{0,200}") {
            shared_mappings(&text);
        }
    }
}
