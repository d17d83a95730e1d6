//! Bytes that are put into guest RAM from outside, such as a kernel's.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use memory_agent::{PAGE_SIZE, PageNumber, PageState};
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::{GuestRam, RamError, RamPage};

/// So much at a time: still in the processor's cache when it is written.
const PIECE: usize = 256 << 10;
/// As zeros, in the program and not on a stack.
static ZEROS: [u8; PIECE] = [0; PIECE];

impl GuestRam {
    /// Puts `length` bytes at a guest physical address, which `read` gives: it fills a buffer from an offset on. Written
    /// through the file, at half the cost a page, and logged as what is written through [`GuestRam::memory`].
    ///
    /// # Errors
    /// When they are not all in one region of RAM, cannot be read, or the host has no memory.
    pub fn load(
        &self,
        address: u64,
        length: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), RamError> {
        let (region, place) = self.place(address, length)?;
        let file = self.file(region)?;
        let mut buffer = vec![0; PIECE.min(usize::try_from(length).unwrap_or(PIECE))];
        let mut done = 0;
        while done < length {
            let piece = &mut buffer[..(length - done).min(PIECE as u64) as usize];
            read(done, piece).map_err(RamError::Source)?;
            let at = place.start + done;
            file.write_all_at(piece, at).map_err(|cause| RamError::Access {
                page: self.layout.page_of(address + done).unwrap_or_default(),
                what: "written",
                cause,
            })?;
            self.log_write(region, at, piece.len());
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Has `length` bytes at a guest physical address read as zeros; what is a hole there stays one.
    ///
    /// # Errors
    /// As [`GuestRam::load`].
    pub fn clear(&self, address: u64, length: u64) -> Result<(), RamError> {
        let (region, place) = self.place(address, length)?;
        let Some(first) = self.layout.page_of(address).filter(|_| length > 0) else { return Ok(()) };
        let count = place.end.div_ceil(PAGE_SIZE) - place.start / PAGE_SIZE;
        let residency = self.residency(first.run(count))?;
        for run in residency.runs().filter(|run| run.state != PageState::Hole) {
            // Pages are cut where the range begins and ends.
            let at = |page: RamPage| (place.start / PAGE_SIZE + (page - first)) * PAGE_SIZE;
            let (mut start, end) = (at(run.pages.start).max(place.start), at(run.pages.end).min(place.end));
            while start < end {
                let zeros = &ZEROS[..(end - start).min(PIECE as u64) as usize];
                let written = self.file(region)?.write_all_at(zeros, start);
                written.map_err(|cause| RamError::Access { page: run.pages.start, what: "written", cause })?;
                self.log_write(region, start, zeros.len());
                start += zeros.len() as u64;
            }
        }
        Ok(())
    }

    /// In which region these bytes are, and where in its file.
    fn place(&self, address: u64, length: u64) -> Result<(usize, Range<u64>), RamError> {
        let end = address.checked_add(length);
        let inside = |start: u64, size: u64| address >= start && end.is_some_and(|end| end - start <= size);
        let found = self.layout.regions().iter().enumerate().find(|(_, region)| inside(region.start, region.length));
        let (region, r) = found.ok_or(RamError::NotRam { start: address, end: address.saturating_add(length) })?;
        Ok((region, address - r.start..address - r.start + length))
    }

    fn log_write(&self, region: usize, offset: u64, length: usize) {
        if let Some(region) = self.memory.iter().nth(region) {
            region.bitmap().mark_dirty(offset as usize, length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_is_there_and_logged_and_what_is_cleared_is_zero() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let length = PIECE as u64 + 5000;
        ram.load(0x1ffe, length, |from, buffer| {
            buffer.iter_mut().zip(from..).for_each(|(byte, at)| *byte = (at % 251) as u8 + 1);
            Ok(())
        })
        .unwrap();
        assert_eq!(
            ram.take_own_writes().runs().collect::<Vec<_>>(),
            [RamPage(1)..RamPage((0x1ffe + length).div_ceil(4096))]
        );
        let mut page = [0; 4096];
        ram.read_pages(RamPage(2).run(1), &mut page).unwrap();
        assert_eq!(page[..3], [3, 4, 5]);
        ram.clear(0x2001, 0x2000).unwrap();
        ram.clear(0x30_0000, 0x2000).unwrap();
        ram.read_pages(RamPage(2).run(1), &mut page).unwrap();
        assert_eq!(page[..3], [3, 0, 0]);
        ram.read_pages(RamPage(4).run(1), &mut page).unwrap();
        assert_eq!((page[0], page[1]), (0, ((0x4001_u64 - 0x1ffe) % 251) as u8 + 1));
        assert_eq!(ram.take_own_writes().runs().collect::<Vec<_>>(), [RamPage(2).run(3)]);
        assert_eq!(ram.residency(RamPage(0x300).run(2)).unwrap().counts().hole, 2);
    }

    #[test]
    fn what_is_not_all_ram_is_refused_before_anything_is_read() {
        let ram = GuestRam::new(1 << 20).unwrap();
        for (address, length) in [(0x10_0000, 1), (0xf_ffff, 2), (u64::MAX, 2), (0, u64::MAX)] {
            let refused = ram.load(address, length, |_, _| unreachable!("read"));
            assert!(matches!(refused, Err(RamError::NotRam { .. })), "{refused:?}");
        }
        let refused = ram.load(0, 4096, |_, _| Err(io::ErrorKind::UnexpectedEof.into()));
        assert!(matches!(refused, Err(RamError::Source(_))), "{refused:?}");
    }
}
