//! Frames from the tap into the guest's buffers.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::sys::{self, Scatter};
use super::tap::HEADER;
use crate::devices::virtio::{Chain, DeviceFault, QueueLock};
use crate::ram::GuestRam;

/// Most bytes of a frame with its header: a packet of 64 KiB behind an Ethernet header and a VLAN's tag.
pub(super) const MOST: usize = HEADER + 18 + (64 << 10);
/// Most frames at once, after which others have their turn.
const BATCH: usize = 128;
/// Most parts of the buffers that are held ready.
const MOST_PARTS: usize = 512;
/// Where `num_buffers` is in the header.
const BUFFERS_AT: u64 = 10;

/// Why no more frames are read.
#[derive(Debug)]
pub(super) enum Stopped {
    /// There is none.
    NoFrame,
    /// The guest has no buffers.
    NoBuffers,
    /// It is others' turn.
    Turn,
    /// The tap has gone.
    Lost(io::Error),
}

/// A frame of which the end has found no room yet.
#[derive(Clone, Copy, Debug)]
struct Held {
    bytes: usize,
    /// How many of them are in the guest's buffers.
    placed: usize,
}

/// One queue of buffers, and frames for it.
#[derive(Debug)]
pub(super) struct Receiver {
    ram: Arc<GuestRam>,
    /// Whether a frame may lie in several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    is_mergeable: bool,
    /// Taken from the queue, in its order, and not used yet.
    chains: VecDeque<Chain>,
    /// Bytes that they have room for.
    room: usize,
    /// The same as the kernel sees them.
    scatter: Scatter,
    /// Chains that were used up, whose memory is used again.
    spare: Vec<Chain>,
    /// What has no room in the buffers.
    rest: Box<[u8]>,
    held: Option<Held>,
}

impl Receiver {
    pub(super) fn new(ram: &Arc<GuestRam>, is_mergeable: bool) -> Self {
        Self {
            ram: Arc::clone(ram),
            is_mergeable,
            chains: VecDeque::new(),
            room: 0,
            scatter: Scatter::new(ram),
            spare: Vec::new(),
            rest: vec![0; MOST].into(),
            held: None,
        }
    }

    /// Reads frames for as long as there are some, and room for them.
    pub(super) fn receive(&mut self, queue: &mut QueueLock<'_>, tap: BorrowedFd<'_>) -> Result<Stopped, DeviceFault> {
        let stopped = self.batch(queue, tap);
        queue.notify()?;
        stopped
    }

    fn batch(&mut self, queue: &mut QueueLock<'_>, tap: BorrowedFd<'_>) -> Result<Stopped, DeviceFault> {
        for _ in 0..BATCH {
            self.take_buffers(queue)?;
            if self.held.is_some() {
                if !self.finish_held(queue)? {
                    return Ok(Stopped::NoBuffers);
                }
                continue;
            }
            if self.chains.is_empty() {
                return Ok(Stopped::NoBuffers);
            }
            match self.scatter.read(tap, &mut self.rest) {
                Ok(bytes) => self.arrived(queue, bytes)?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Stopped::NoFrame),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Ok(Stopped::Lost(e)),
            }
        }
        Ok(Stopped::Turn)
    }

    /// Takes chains until the longest frame has room, or there are no more.
    fn take_buffers(&mut self, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        while self.wants_buffers() {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop_into(&mut chain)? {
                self.spare.push(chain);
                break;
            }
            let bytes = chain.writable.len() as usize;
            if bytes < HEADER {
                return Err(queue.fault(format!("a buffer of {bytes} bytes has no room for the header of a frame")));
            }
            self.scatter.push(chain.writable.parts()).map_err(|e| queue.fault(e.to_string()))?;
            self.room += bytes;
            self.chains.push_back(chain);
        }
        Ok(())
    }

    fn wants_buffers(&self) -> bool {
        let has_enough = self.room >= MOST || self.scatter.len() >= MOST_PARTS;
        if self.is_mergeable { !has_enough } else { self.chains.is_empty() }
    }

    /// A frame of so many bytes has been read.
    fn arrived(&mut self, queue: &mut QueueLock<'_>, bytes: usize) -> Result<(), DeviceFault> {
        let is_possible = (HEADER..=MOST).contains(&bytes);
        if is_possible && bytes <= self.room {
            return self.deliver(queue, bytes);
        }
        // Without mergeable buffers, one that does not fit is lost, as is one that no driver takes.
        if is_possible && self.is_mergeable {
            self.held = Some(Held { bytes, placed: self.room });
        }
        Ok(())
    }

    /// Places the end of a frame for which there was no room; whether there was now. It is given up when the driver has no more
    /// buffers than these.
    fn finish_held(&mut self, queue: &mut QueueLock<'_>) -> Result<bool, DeviceFault> {
        let Some(held) = self.held else { return Ok(true) };
        if held.bytes > self.room {
            let is_hopeless = self.chains.len() >= usize::from(queue.size()) || self.scatter.len() >= MOST_PARTS;
            if is_hopeless {
                self.held = None;
            }
            return Ok(is_hopeless);
        }
        self.held = None;
        let rest = &self.rest[..held.bytes - held.placed];
        let parts = self.chains.iter().flat_map(|chain| chain.writable.parts());
        write_at(&self.ram, parts, held.placed as u64, rest).map_err(|e| queue.fault(e.to_string()))?;
        self.deliver(queue, held.bytes)?;
        Ok(true)
    }

    /// Gives the driver the chains in which a frame lies.
    fn deliver(&mut self, queue: &mut QueueLock<'_>, bytes: usize) -> Result<(), DeviceFault> {
        let mut left = bytes as u64;
        let mut count: u16 = 0;
        for chain in &self.chains {
            let here = left.min(chain.writable.len());
            sys::mark_written(&self.ram, chain.writable.parts(), here).map_err(|e| queue.fault(e.to_string()))?;
            queue.fill(count, chain.head, here as u32)?;
            count += 1;
            left -= here;
            if left == 0 {
                break;
            }
        }
        let first = self.chains.front().map(|chain| chain.writable.parts()).unwrap_or_default();
        write_at(&self.ram, first, BUFFERS_AT, &count.to_le_bytes()).map_err(|e| queue.fault(e.to_string()))?;
        for chain in self.chains.drain(..usize::from(count)) {
            self.room -= chain.writable.len() as usize;
            self.scatter.pop_front(chain.writable.parts().len());
            self.spare.push(chain);
        }
        queue.publish(count)
    }

    /// Puts the chains back that have not been used. A frame of which the end has found no room is lost.
    pub(super) fn put_back(&mut self, queue: &mut QueueLock<'_>) {
        for chain in self.chains.drain(..) {
            queue.undo_pop();
            self.spare.push(chain);
        }
        self.scatter.clear();
        (self.room, self.held) = (0, None);
    }
}

/// Writes `bytes` into parts of guest RAM, `offset` bytes behind the first of them.
fn write_at<'a>(
    ram: &GuestRam,
    parts: impl IntoIterator<Item = &'a (GuestAddress, u32)>,
    mut offset: u64,
    mut bytes: &[u8],
) -> Result<(), GuestMemoryError> {
    for (address, length) in parts {
        let length = u64::from(*length);
        if offset >= length {
            offset -= length;
            continue;
        }
        let here = bytes.len().min((length - offset) as usize);
        ram.memory().write_slice(&bytes[..here], GuestAddress(address.0 + offset))?;
        bytes = &bytes[here..];
        offset = 0;
        if bytes.is_empty() {
            break;
        }
    }
    Ok(())
}
