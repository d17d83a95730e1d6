//! Whoever carries out what a disk does to its image, and how that is told.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::image::Image;
use super::sys::{self, Aligned};
use crate::devices::virtio::Buffers;
use crate::ram::GuestRam;

/// Memory that is read into or written from.
#[derive(Debug)]
pub(super) enum Data {
    /// The guest's own.
    Guest(Buffers),
    /// Memory in between, since the guest's is not aligned as direct I/O needs it.
    Between(Aligned),
}

/// What is done to an image at once. Offsets and lengths are bytes.
#[derive(Debug)]
pub(super) enum Operation {
    /// From the image into memory.
    Read(u64, Data),
    /// From memory into the image; with `true`, it is to last before it has ended.
    Write(u64, Data, bool),
    /// What was written before is to last.
    Sync,
    /// `fallocate` with this mode, on the range of this start and length.
    Allocate(i32, u64, u64),
}

/// An operation that has ended, with its number and what the kernel said: a number of bytes, 0, or a negative errno.
pub(super) type Ended = (u64, Operation, i32);

/// Carries out operations on one image.
pub(super) trait Engine: Send {
    /// Takes an operation, which may end at any time from now on.
    ///
    /// # Errors
    /// When the kernel takes no more; the operation is lost.
    fn begin(&mut self, number: u64, operation: Operation) -> io::Result<()>;

    /// Has the kernel know of all that was begun.
    ///
    /// # Errors
    /// When it does not take them.
    fn submit(&mut self) -> io::Result<()>;

    /// Whether one has ended.
    fn has_ended(&mut self) -> bool;

    /// One that has ended.
    fn ended(&mut self) -> Option<Ended>;

    /// How many have begun and not been given back.
    fn flying(&self) -> usize;

    /// Readable as long as there is one that has ended, if that can be later than [`Engine::submit`].
    fn event(&self) -> Option<RawFd>;
}

/// Carries each out when it begins, where io_uring is not to be had.
#[derive(Debug)]
pub(super) struct Plain {
    image: Arc<Image>,
    ram: Arc<GuestRam>,
    ended: VecDeque<Ended>,
}

impl Plain {
    pub(super) fn new(image: &Arc<Image>, ram: &Arc<GuestRam>) -> Self {
        Self { image: Arc::clone(image), ram: Arc::clone(ram), ended: VecDeque::new() }
    }
}

impl Engine for Plain {
    fn begin(&mut self, number: u64, mut operation: Operation) -> io::Result<()> {
        let result = sys::carry_out(&self.image.file, &self.ram, &mut operation);
        let result = result.map_or_else(|e| -e.raw_os_error().unwrap_or(libc::EIO), |bytes| bytes as i32);
        self.ended.push_back((number, operation, result));
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn has_ended(&mut self) -> bool {
        !self.ended.is_empty()
    }

    fn ended(&mut self) -> Option<Ended> {
        self.ended.pop_front()
    }

    fn flying(&self) -> usize {
        self.ended.len()
    }

    fn event(&self) -> Option<RawFd> {
        None
    }
}
