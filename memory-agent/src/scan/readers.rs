//! Readers that ship.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::Reader;
use crate::page_number::{FilePage, PageNumber};
use crate::page_range::{PageRange, PageRanges};
use crate::page_state::{PAGE_SIZE, is_zero};

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// BLAKE3 of the content, holes as zeros: what `b3sum` says of a dump.
#[derive(Clone, Debug, Default)]
pub struct ContentHash(blake3::Hasher);

impl ContentHash {
    /// The hash, as 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

impl Reader for ContentHash {
    fn hole(&mut self, pages: Range<FilePage>) -> io::Result<()> {
        let mut left = pages.byte_count();
        while left > 0 {
            let length = left.min(ZEROS.len() as u64);
            self.0.update(&ZEROS[..length as usize]);
            left -= length;
        }
        Ok(())
    }

    fn content(&mut self, _pages: Range<FilePage>, bytes: &[u8]) -> io::Result<()> {
        self.0.update(bytes);
        Ok(())
    }
}

/// Finds pages that take memory or swap and hold nothing but zeros: discarding them would change nothing.
#[derive(Clone, Debug, Default)]
pub struct ZeroFinder {
    ranges: PageRanges<FilePage>,
}

impl ZeroFinder {
    /// The zero pages, in order and as few ranges as possible.
    pub fn ranges(&self) -> &[Range<FilePage>] {
        &self.ranges
    }

    /// How many there are.
    pub fn pages(&self) -> u64 {
        self.ranges.page_count()
    }
}

impl Reader for ZeroFinder {
    fn hole(&mut self, _pages: Range<FilePage>) -> io::Result<()> {
        Ok(())
    }

    fn content(&mut self, pages: Range<FilePage>, bytes: &[u8]) -> io::Result<()> {
        for (page, bytes) in pages.pages().zip(bytes.chunks(PAGE_SIZE as usize)) {
            if is_zero(bytes) {
                self.ranges.push(page.run(1));
            }
        }
        Ok(())
    }
}

/// Copies the content to a file, where holes and zero pages stay holes.
#[derive(Debug)]
pub struct SparseDump {
    file: File,
    first: FilePage,
    written: u64,
}

impl SparseDump {
    /// A dump of `pages` to a file, which then has exactly their size.
    ///
    /// # Errors
    /// When the file cannot get that size.
    pub fn new(file: File, pages: &Range<FilePage>) -> io::Result<Self> {
        file.set_len(0)?;
        file.set_len(pages.byte_count())?;
        Ok(Self { file, first: pages.start, written: 0 })
    }

    /// Pages written so far.
    pub fn written(&self) -> u64 {
        self.written
    }
}

impl Reader for SparseDump {
    fn hole(&mut self, _pages: Range<FilePage>) -> io::Result<()> {
        Ok(())
    }

    fn content(&mut self, pages: Range<FilePage>, bytes: &[u8]) -> io::Result<()> {
        const PAGE: usize = PAGE_SIZE as usize;
        let mut page = pages.start;
        for run in bytes.chunks(PAGE).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let start = (page - pages.start) as usize * PAGE;
            if !is_zero(run[0]) {
                self.file.write_all_at(&bytes[start..start + run.len() * PAGE], (page - self.first) * PAGE_SIZE)?;
                self.written += run.len() as u64;
            }
            page += run.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    fn feed(reader: &mut dyn Reader) -> Vec<u8> {
        let mut bytes = vec![0; 6 * PAGE];
        bytes[PAGE] = 1;
        bytes[2 * PAGE + 4095] = 1;
        reader.content(FilePage::range(10..16), &bytes).unwrap();
        reader.hole(FilePage::range(16..18)).unwrap();
        reader.content(FilePage::range(18..19), &[7; PAGE]).unwrap();
        bytes.extend([0; 2 * PAGE]);
        bytes.extend([7; PAGE]);
        bytes
    }

    #[test]
    fn the_hash_is_of_the_content() {
        let mut hash = ContentHash::default();
        let all = feed(&mut hash);
        assert_eq!(hash.hex(), blake3::hash(&all).to_hex().to_string());
    }

    #[test]
    fn zero_pages_are_found() {
        let mut finder = ZeroFinder::default();
        feed(&mut finder);
        assert_eq!((finder.ranges(), finder.pages()), (&[FilePage::range(10..11), FilePage::range(13..16)][..], 4));
    }

    #[test]
    fn a_dump_is_the_content_and_sparse() {
        let mut file = tempfile::tempfile().unwrap();
        let mut dump = SparseDump::new(file.try_clone().unwrap(), &FilePage::range(10..19)).unwrap();
        let all = feed(&mut dump);
        assert_eq!(dump.written(), 3);
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert!(content == all);
    }
}
