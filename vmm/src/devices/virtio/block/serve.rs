//! What the worker of a queue does: requests into operations, what has ended into answers.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use vmm_sys_util::epoll::EventSet;

use super::engine::{Data, Ended, Engine, Operation};
use super::image::Image;
use super::request::{Request, Work};
use super::sys::{self, Aligned};
use super::{BlockConfig, QUEUE_SIZE};
use crate::devices::virtio::{Activation, Buffers, DeviceFault, Events, Handler, QueueLock, Virtqueue};
use crate::host::adaptive_poll::AdaptivePoll;
use crate::log_limit::LogLimit;

/// By which the worker learns that operations have ended.
const ENDED: u64 = 0;
/// Most bytes of zeros that are written at once, where the image cannot have holes.
const ZEROS: u64 = 1 << 20;
/// Most requests under way at a time: what a driver that is right can have.
const MOST_UNDER_WAY: usize = QUEUE_SIZE as usize;
/// Most bytes between the guest's memory and the kernel, besides those of the request that exceeds it.
const MOST_BETWEEN: u64 = 32 << 20;
/// So long is looked for more after something has come.
const POLL: Duration = Duration::from_micros(50);
/// How often is looked before whoever has something to tell the worker is heard.
const TURNS: u32 = 64;
/// Modes of `fallocate` that make zeros, the one that gives room back first.
const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;

/// A request that has begun.
#[derive(Debug)]
struct Begun {
    head: u16,
    status: Buffers,
    /// Bytes that have been read into the guest's memory.
    read: u64,
    /// Bytes of memory in between that it had at first.
    between: u64,
    /// The guest's memory, while the kernel works with other memory in between.
    behind: Option<Buffers>,
    /// What is still to become holes or zeros.
    ranges: VecDeque<(u64, u64)>,
    /// Whether ranges must read as zeros afterwards.
    must_be_zeros: bool,
}

pub(super) struct Serving {
    activation: Activation,
    queue: Arc<Virtqueue>,
    config: BlockConfig,
    image: Arc<Image>,
    engine: Box<dyn Engine>,
    /// Whether the driver never asks for writes to last: then each does.
    writes_last: bool,
    begun: HashMap<u64, Begun>,
    /// Bytes of memory in between.
    between: u64,
    next: u64,
    /// Whether something has been given back of which the driver has not been told.
    has_answered: bool,
    adaptive_poll: AdaptivePoll,
    log: LogLimit,
}

impl Serving {
    pub(super) fn new(
        activation: &Activation,
        queue: &Arc<Virtqueue>,
        config: &BlockConfig,
        image: &Arc<Image>,
        engine: Box<dyn Engine>,
    ) -> Self {
        Self {
            activation: activation.clone(),
            queue: Arc::clone(queue),
            config: config.clone(),
            image: Arc::clone(image),
            engine,
            writes_last: !activation.has(VIRTIO_BLK_F_FLUSH),
            begun: HashMap::new(),
            between: 0,
            next: 0,
            has_answered: false,
            adaptive_poll: AdaptivePoll::new(POLL),
            log: LogLimit::default(),
        }
    }

    /// Begins what the driver has asked for and answers what has ended, for as long as more comes soon. Meanwhile the driver need not
    /// notify, and is told of all that has ended at once.
    fn serve(&mut self) -> Result<(), DeviceFault> {
        let (queue, activation) = (Arc::clone(&self.queue), self.activation.clone());
        let mut queue = queue.lock(&activation.ram, activation.notify.as_ref());
        if !queue.is_ready() {
            return Ok(());
        }
        queue.disable_kicks()?;
        for _ in 0..TURNS {
            self.take(&mut queue)?;
            self.answer(&mut queue)?;
            self.tell(&mut queue)?;
            if self.is_more_coming(&mut queue)? {
                continue;
            }
            // With as much as can be under way, an end is what is waited for.
            if self.is_full() || !queue.enable_kicks()? {
                return Ok(());
            }
            queue.disable_kicks()?;
        }
        // Somebody else is heard, and then it goes on here. Fails only where the event is set already.
        let _ = self.queue.kick().write(1);
        Ok(())
    }

    /// Begins what the driver has asked for.
    fn take(&mut self, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        let mut has_begun = false;
        while !self.is_full() {
            let Some(chain) = queue.pop_quietly()? else { break };
            has_begun = true;
            let request = Request::new(self.queue.index(), chain, &self.activation.ram, &self.config)?;
            self.begin(request, queue)?;
        }
        if has_begun {
            self.adaptive_poll.keep_polling();
            self.submit(queue)?;
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.engine.flying() >= MOST_UNDER_WAY || self.between > MOST_BETWEEN
    }

    /// Looks for a short time whether something has ended, or more is asked for.
    fn is_more_coming(&mut self, queue: &mut QueueLock<'_>) -> Result<bool, DeviceFault> {
        let is_full = self.is_full();
        let engine = &mut self.engine;
        self.adaptive_poll.look_with(None, || Ok(engine.has_ended() || !is_full && queue.has_more()?))
    }

    /// Tells the driver, if it has not been told of all.
    fn tell(&mut self, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        if std::mem::take(&mut self.has_answered) { queue.notify() } else { Ok(()) }
    }

    fn submit(&mut self, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        let refused = |cause| DeviceFault::Host { what: "io_uring_enter", cause };
        while let Err(e) = self.engine.submit() {
            if e.kind() != std::io::ErrorKind::ResourceBusy && e.kind() != std::io::ErrorKind::Interrupted {
                return Err(refused(e));
            }
            // The kernel has no room before somebody takes what has ended.
            self.answer(queue)?;
        }
        Ok(())
    }

    /// Answers what has ended.
    fn answer(&mut self, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        let mut goes_on = false;
        while let Some((number, operation, result)) = self.engine.ended() {
            self.adaptive_poll.keep_polling();
            goes_on |= self.end((number, operation, result), queue)?;
        }
        if goes_on { self.submit(queue) } else { Ok(()) }
    }

    fn begin(&mut self, request: Request, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        let Request { head, status, work } = request;
        let (behind, ranges) = (None, VecDeque::new());
        let mut begun = Begun { head, status, read: 0, between: 0, behind, ranges, must_be_zeros: false };
        let operation = match work {
            Work::Refuse(status) => return self.finish(&begun, status, queue),
            Work::Identify(place) => {
                let done = place.write(&self.activation.ram, &self.identity());
                begun.read = u64::from(VIRTIO_BLK_ID_BYTES);
                return self.finish(&begun, if done.is_ok() { OK } else { FAILED }, queue);
            }
            Work::Read(_, buffers) | Work::Write(_, buffers) if buffers.is_empty() => {
                return self.finish(&begun, OK, queue);
            }
            Work::Read(offset, buffers) => Operation::Read(offset, self.data(buffers, &mut begun, false)?),
            Work::Write(offset, buffers) => {
                Operation::Write(offset, self.data(buffers, &mut begun, true)?, self.writes_last)
            }
            Work::Flush => Operation::Sync,
            Work::Discard(ranges) => {
                begun.ranges = ranges;
                return self.next_range(begun, HOLE, queue).map(drop);
            }
            Work::Zero(ranges) => {
                (begun.ranges, begun.must_be_zeros) = (ranges, true);
                return self.next_range(begun, HOLE, queue).map(drop);
            }
        };
        self.fly(begun, operation, queue)
    }

    /// The memory of a request: the guest's own, or some in between where direct I/O cannot take that.
    fn data(&mut self, buffers: Buffers, begun: &mut Begun, is_written: bool) -> Result<Data, DeviceFault> {
        let alignment = u64::from(self.image.alignment);
        // RAM is mapped at whole pages: what is aligned in the guest is aligned here.
        let is_aligned = |(address, length): &(vm_memory::GuestAddress, u32)| {
            address.0.is_multiple_of(alignment) && u64::from(*length).is_multiple_of(alignment)
        };
        if buffers.parts().iter().all(is_aligned) {
            return Ok(Data::Guest(buffers));
        }
        let mut between = Aligned::new(buffers.len() as usize, alignment as usize);
        self.between += buffers.len();
        begun.between = buffers.len();
        if is_written {
            let queue = self.queue.index();
            let wrong = |e: vm_memory::GuestMemoryError| DeviceFault::Queue { queue, why: e.to_string() };
            buffers.read(&self.activation.ram, between.bytes()).map_err(wrong)?;
        }
        begun.behind = Some(buffers);
        Ok(Data::Between(between))
    }

    fn fly(&mut self, begun: Begun, operation: Operation, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        let number = self.next;
        self.next += 1;
        match self.engine.begin(number, operation) {
            Ok(()) => {
                self.begun.insert(number, begun);
                Ok(())
            }
            Err(e) => {
                self.complain(&e);
                self.finish(&begun, FAILED, queue)
            }
        }
    }

    /// Has the next range become a hole, or zeros; ends the request when there is none. Whether something has begun.
    fn next_range(&mut self, mut begun: Begun, mode: i32, queue: &mut QueueLock<'_>) -> Result<bool, DeviceFault> {
        match begun.ranges.pop_front() {
            Some((start, length)) => {
                self.fly(begun, Operation::Allocate(mode, start, length), queue)?;
                Ok(true)
            }
            None => self.finish(&begun, OK, queue).map(|()| false),
        }
    }

    /// What follows from an operation's end; whether another has begun.
    fn end(&mut self, (number, operation, result): Ended, queue: &mut QueueLock<'_>) -> Result<bool, DeviceFault> {
        let Some(mut begun) = self.begun.remove(&number) else { return Ok(false) };
        if let Operation::Read(_, Data::Guest(buffers)) = &operation {
            // All of them: what failed, or was short, may have been begun.
            sys::mark_written(&self.activation.ram, buffers);
        }
        match (operation, result) {
            (Operation::Allocate(mode, start, length), r) if r == -libc::EOPNOTSUPP || r == -libc::ENOSYS => {
                self.without_holes(begun, mode, start, length, queue)
            }
            (_, error) if error < 0 => {
                self.complain(&std::io::Error::from_raw_os_error(-error));
                self.finish(&begun, FAILED, queue).map(|()| false)
            }
            (Operation::Sync, _) => {
                // The kernel tells of what could not be written once, and may have told the migration.
                let status = if self.image.take_spoilt() { FAILED } else { OK };
                self.finish(&begun, status, queue).map(|()| false)
            }
            (Operation::Allocate(..), _) => self.next_range(begun, HOLE, queue),
            (Operation::Read(offset, data), bytes) => {
                let bytes = bytes as u64;
                let rest = self.rest_of_read(data, &mut begun, bytes);
                begun.read += bytes;
                self.go_on(begun, rest, bytes, |rest| Operation::Read(offset + bytes, rest), queue)
            }
            (Operation::Write(offset, data, lasts), bytes) => {
                let bytes = bytes as u64;
                let rest = rest_of_write(data, bytes);
                self.go_on(begun, rest, bytes, |rest| Operation::Write(offset + bytes, rest, lasts), queue)
            }
        }
    }

    /// Reads or writes what is left, if anything is and something was done; whether it does.
    fn go_on(
        &mut self,
        begun: Begun,
        rest: Option<Data>,
        bytes: u64,
        operation: impl FnOnce(Data) -> Operation,
        queue: &mut QueueLock<'_>,
    ) -> Result<bool, DeviceFault> {
        match rest {
            None if begun.must_be_zeros => self.next_range(begun, HOLE, queue),
            None => self.finish(&begun, OK, queue).map(|()| false),
            Some(_) if bytes == 0 => {
                self.complain(&std::io::Error::other("it has become shorter"));
                self.finish(&begun, FAILED, queue).map(|()| false)
            }
            Some(rest) => self.fly(begun, operation(rest), queue).map(|()| true),
        }
    }

    /// What has been read reaches the guest; what is left to read.
    fn rest_of_read(&self, data: Data, begun: &mut Begun, bytes: u64) -> Option<Data> {
        match data {
            Data::Guest(mut buffers) => {
                let _ = buffers.split_to(bytes);
                (!buffers.is_empty()).then_some(Data::Guest(buffers))
            }
            Data::Between(mut between) => {
                let behind = begun.behind.as_mut()?;
                let place = behind.split_to(bytes);
                // Buffers of this machine's RAM can be written.
                let _ = place.write(&self.activation.ram, &between.bytes()[..bytes as usize]);
                let left = behind.len() as usize;
                (left > 0).then(|| Data::Between(Aligned::new(left, self.image.alignment as usize)))
            }
        }
    }

    /// The image cannot have holes in this way.
    fn without_holes(
        &mut self,
        begun: Begun,
        mode: i32,
        start: u64,
        length: u64,
        queue: &mut QueueLock<'_>,
    ) -> Result<bool, DeviceFault> {
        if !begun.must_be_zeros {
            // Nothing need become of what is discarded.
            return self.next_range(begun, HOLE, queue);
        }
        if mode == HOLE {
            return self.fly(begun, Operation::Allocate(ZERO, start, length), queue).map(|()| true);
        }
        let now = length.min(ZEROS);
        let mut begun = begun;
        if now < length {
            begun.ranges.push_front((start + now, length - now));
        }
        let zeros = Data::Between(Aligned::new(now as usize, self.image.alignment.max(1) as usize));
        self.fly(begun, Operation::Write(start, zeros, self.writes_last), queue).map(|()| true)
    }

    /// Answers a request.
    fn finish(&mut self, begun: &Begun, status: u8, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        self.between -= begun.between;
        self.has_answered = true;
        let wrong =
            |e: vm_memory::GuestMemoryError| DeviceFault::Queue { queue: self.queue.index(), why: e.to_string() };
        begun.status.write(&self.activation.ram, &[status]).map_err(wrong)?;
        queue.push(begun.head, begun.read as u32 + 1)
    }

    fn identity(&self) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
        let mut identity = [0; VIRTIO_BLK_ID_BYTES as usize];
        let serial = self.config.serial.as_bytes();
        let length = serial.len().min(identity.len());
        identity[..length].copy_from_slice(&serial[..length]);
        identity
    }

    fn complain(&mut self, cause: &std::io::Error) {
        if self.log.is_due() {
            let path = self.image.backend.path.display();
            tracing::warn!("disk {path}: the guest is told of an I/O error: {cause}");
        }
    }
}

/// What is left to write.
fn rest_of_write(data: Data, bytes: u64) -> Option<Data> {
    match data {
        Data::Guest(mut buffers) => {
            let _ = buffers.split_to(bytes);
            (!buffers.is_empty()).then_some(Data::Guest(buffers))
        }
        Data::Between(between) => between.behind(bytes as usize).map(Data::Between),
    }
}

impl Handler for Serving {
    fn start(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let host = |cause| DeviceFault::Host { what: "epoll_ctl", cause };
        self.engine.event().map_or(Ok(()), |event| events.add(&event, EventSet::IN, ENDED).map_err(host))
    }

    fn queue(&mut self, _: u16, _: &Events) -> Result<(), DeviceFault> {
        self.serve()
    }

    fn event(&mut self, _: u64, _: EventSet, _: &Events) -> Result<(), DeviceFault> {
        self.serve()
    }

    fn quiesce(&mut self) -> bool {
        let (queue, activation) = (Arc::clone(&self.queue), self.activation.clone());
        let mut queue = queue.lock(&activation.ram, activation.notify.as_ref());
        let mut result = Ok(());
        while self.engine.has_ended() {
            match result {
                Ok(()) => result = self.answer(&mut queue),
                // What cannot be answered is waited for all the same.
                Err(_) => while self.engine.ended().is_some() {},
            }
        }
        if let Err(e) = result.and_then(|()| self.tell(&mut queue)) {
            tracing::warn!("disk {}: {e}", self.image.backend.path.display());
        }
        self.engine.flying() == 0
    }
}
