//! Calls by which the kernel reads and writes memory that it is given as addresses.
//!
//! What holds everywhere here: a buffer of the guest's is in RAM (`Chain` has checked it), and RAM stays mapped as long as its
//! [`GuestRam`] lives, of which whoever has an operation under way holds a count. The guest may read and write such memory meanwhile;
//! nothing here makes a reference to it.
#![allow(unsafe_code, reason = "the kernel is given addresses of guest memory")]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};

use super::engine::{Data, Ended, Engine, Operation};
use super::image::Image;
use crate::devices::virtio::Buffers;
use crate::ram::GuestRam;

/// What is to become of a range of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RangeLock {
    /// Locked with others that lock it so (`F_RDLCK`).
    Shared,
    /// Locked alone (`F_WRLCK`).
    Alone,
    /// Not locked.
    Free,
}

fn region(lock: RangeLock, bytes: &Range<u64>) -> libc::flock {
    // SAFETY: a flock of zeros is one; what counts is set below.
    let mut region: libc::flock = unsafe { std::mem::zeroed() };
    let kind = match lock {
        RangeLock::Shared => libc::F_RDLCK,
        RangeLock::Alone => libc::F_WRLCK,
        RangeLock::Free => libc::F_UNLCK,
    };
    region.l_type = kind as libc::c_short;
    region.l_whence = libc::SEEK_SET as libc::c_short;
    (region.l_start, region.l_len) = (bytes.start as i64, (bytes.end - bytes.start) as i64);
    region
}

/// Locks these bytes for this open file, or lets go of them (`F_OFD_SETLK`, fcntl(2)); whether nobody else has a lock that forbids it.
/// What was locked before stays then. Locks end when the file is closed.
///
/// # Errors
/// When the file can have no locks.
pub(super) fn lock(file: &File, lock: RangeLock, bytes: &Range<u64>) -> io::Result<bool> {
    let region = region(lock, bytes);
    // SAFETY: the descriptor is open, and the structure is one that the call takes and lives until it returns.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &region) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            e => Err(e),
        },
    }
}

/// Whether another open file has a lock on one of these bytes (`F_OFD_GETLK`).
///
/// # Errors
/// When the file can have no locks.
pub(super) fn is_locked(file: &File, bytes: &Range<u64>) -> io::Result<bool> {
    let mut region = region(RangeLock::Alone, bytes);
    // SAFETY: as above, and the call writes into the structure.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut region) } {
        0 => Ok(region.l_type != libc::F_UNLCK as libc::c_short),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Memory at an address that direct I/O takes.
#[derive(Debug)]
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
    alignment: usize,
}

impl Aligned {
    /// `length` bytes of zeros at a multiple of `alignment`.
    pub(super) fn new(length: usize, alignment: usize) -> Self {
        let memory = vec![0_u8; length + alignment];
        let start = memory.as_ptr().align_offset(alignment).min(alignment);
        Self { memory, start, length, alignment }
    }

    /// What is behind the first bytes, unless there is nothing.
    pub(super) fn behind(mut self, bytes: usize) -> Option<Self> {
        let left = self.length.checked_sub(bytes).filter(|left| *left > 0)?;
        let mut rest = Self::new(left, self.alignment);
        rest.bytes().copy_from_slice(&self.bytes()[bytes..]);
        Some(rest)
    }

    /// The bytes.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// Reads into `bytes` from `offset` on, once.
///
/// # Errors
/// What the kernel says.
pub(super) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, bytes, offset)
}

fn vectors(ram: &GuestRam, data: &mut Data) -> io::Result<Box<[libc::iovec]>> {
    let of = |bytes: *mut u8, length: usize| libc::iovec { iov_base: bytes.cast(), iov_len: length };
    match data {
        Data::Guest(buffers) => buffers
            .slices(ram)
            .map(|slice| slice.map(|slice| of(slice.ptr_guard_mut().as_ptr(), slice.len())).map_err(io::Error::other))
            .collect(),
        Data::Between(between) => {
            let bytes = between.bytes();
            Ok(Box::new([of(bytes.as_mut_ptr(), bytes.len())]))
        }
    }
}

/// Carries out an operation and waits for it; gives what the kernel says.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn carry_out(file: &File, ram: &GuestRam, operation: &mut Operation) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let result = match operation {
        Operation::Read(offset, data) => {
            let vectors = vectors(ram, data)?;
            // SAFETY: each vector is memory that stays mapped while `ram` and `data` are borrowed, and may be written.
            unsafe { libc::preadv(fd, vectors.as_ptr(), vectors.len() as i32, *offset as i64) }
        }
        Operation::Write(offset, data, lasting) => {
            let vectors = vectors(ram, data)?;
            let flags = if *lasting { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above, and it is only read.
            unsafe { libc::pwritev2(fd, vectors.as_ptr(), vectors.len() as i32, *offset as i64, flags) }
        }
        Operation::Sync => {
            // SAFETY: takes a descriptor, which is open.
            (unsafe { libc::fdatasync(fd) }) as isize
        }
        Operation::Allocate(mode, start, length) => {
            // SAFETY: takes numbers and a descriptor, which is open.
            (unsafe { libc::fallocate(fd, *mode, *start as i64, *length as i64) }) as isize
        }
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What the kernel reads addresses from.
#[derive(Default)]
struct Vectors(Box<[libc::iovec]>);

// SAFETY: they are addresses, which nobody follows here; the kernel may in whichever thread's name.
unsafe impl Send for Vectors {}

/// An operation that the kernel has.
struct Flight {
    operation: Operation,
    _vectors: Vectors,
}

/// An io_uring for one image.
pub(super) struct Ring {
    ring: IoUring,
    image: Arc<Image>,
    ram: Arc<GuestRam>,
    flights: HashMap<u64, Flight>,
}

impl Ring {
    /// A ring for as many operations at a time.
    ///
    /// # Errors
    /// When the kernel has no io_uring for this process.
    pub(super) fn new(image: &Arc<Image>, ram: &Arc<GuestRam>, operations: u16) -> io::Result<Self> {
        let ring = IoUring::builder().setup_clamp().build(operations.into())?;
        Ok(Self { ring, image: Arc::clone(image), ram: Arc::clone(ram), flights: HashMap::new() })
    }

    /// Waits until one has ended.
    fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            waited => waited.map(drop),
        }
    }
}

impl Engine for Ring {
    fn begin(&mut self, number: u64, mut operation: Operation) -> io::Result<()> {
        let fd = types::Fd(self.image.file.as_raw_fd());
        let mut of = Vectors::default();
        let entry = match &mut operation {
            Operation::Read(offset, data) => {
                of = Vectors(vectors(&self.ram, data)?);
                opcode::Readv::new(fd, of.0.as_ptr(), of.0.len() as u32).offset(*offset).build()
            }
            Operation::Write(offset, data, lasting) => {
                of = Vectors(vectors(&self.ram, data)?);
                let flags = if *lasting { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, of.0.as_ptr(), of.0.len() as u32).offset(*offset).rw_flags(flags).build()
            }
            Operation::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Allocate(mode, start, length) => {
                opcode::Fallocate::new(fd, *length).offset(*start).mode(*mode).build()
            }
        };
        let entry = entry.user_data(number);
        if self.ring.submission().is_full() {
            self.ring.submit()?;
        }
        self.flights.insert(number, Flight { operation, _vectors: of });
        // SAFETY: vectors and memory in between are in `flights`, on the heap, until the kernel has said that the operation has
        // ended; guest memory stays mapped by `self.ram`, and the file open by `self.image`. When the ring goes, `Drop` waits for all.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| {
            self.flights.remove(&number);
            io::ErrorKind::WouldBlock.into()
        })
    }

    fn submit(&mut self) -> io::Result<()> {
        self.ring.submit().map(drop)
    }

    fn has_ended(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    fn ended(&mut self) -> Option<Ended> {
        let entry = self.ring.completion().next()?;
        let flight = self.flights.remove(&entry.user_data())?;
        Some((entry.user_data(), flight.operation, entry.result()))
    }

    fn flying(&self) -> usize {
        self.flights.len()
    }

    fn event(&self) -> Option<RawFd> {
        // The ring's own descriptor is readable as long as something has ended that nobody has taken: whoever takes it before
        // sleeping is not woken for it, as an event registered with the ring would do.
        Some(self.ring.as_raw_fd())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while !self.flights.is_empty() {
            if self.wait().is_err() {
                // Nobody knows what the kernel still does with this memory: it is kept for good.
                std::mem::forget((Arc::clone(&self.ram), Arc::clone(&self.image), std::mem::take(&mut self.flights)));
                return;
            }
            while self.ended().is_some() {}
        }
    }
}

/// Logs these buffers, which the kernel had to write into, as the monitor's own writing.
pub(super) fn mark_written(ram: &GuestRam, buffers: &Buffers) {
    use vm_memory::bitmap::Bitmap;
    for slice in buffers.slices(ram).flatten() {
        slice.bitmap().mark_dirty(0, slice.len());
    }
}
