//! Pages that are pinned for a while.

use std::ops::Range;

use io_uring::IoUring;

use super::SharedMap;
use crate::page_number::FilePage;

/// Ranges that one ring takes (`IORING_MAX_REG_BUFFERS` of older kernels, io_uring/rsrc.c).
pub(crate) const MOST_RANGES: usize = 1024;

/// Pages pinned as buffers of an io_uring that does no I/O (io_uring/rsrc.c `io_pin_pages`), until this is dropped. They are
/// pinned for writing: a page that was clean counts as written afterwards, and a hole is allocated.
pub(crate) struct Pins<'m> {
    ring: IoUring,
    _map: &'m SharedMap,
}

impl<'m> Pins<'m> {
    /// Pins pages of a writable mapping, at most [`MOST_RANGES`] ranges. Panics unless they are all in it.
    pub(crate) fn take(map: &'m SharedMap, ranges: &[Range<FilePage>]) -> std::io::Result<Self> {
        let ring = IoUring::new(1)?;
        let buffer = |pages: &Range<FilePage>| {
            let (address, length) = map.at(pages);
            libc::iovec { iov_base: address.as_ptr(), iov_len: length }
        };
        let buffers: Vec<_> = ranges.iter().map(buffer).collect();
        // SAFETY: the addresses are of a mapping that lives as long as the ring, and nobody is ever told to read or write
        // the buffers.
        unsafe { ring.submitter().register_buffers(&buffers) }?;
        Ok(Self { ring, _map: map })
    }
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        // A ring that is closed lets go of them later, in its own time. Failure would mean that there are none.
        let _ = self.ring.submitter().unregister_buffers();
    }
}
