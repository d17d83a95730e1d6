//! The disk (Virtio 1.2, 5.2): requests at a depth, and what came of each block.

use core::ptr;

use super::Setting;
use super::queue::{Descriptor, Queue, Rings};
use super::transport::{DeviceError, EVENT_INDEX, INDIRECT, Kind, Transport};
use crate::arena::Arena;
use crate::bars::Window;
use crate::block::{self, BLOCK, Content, Coverage};
use crate::device_report::{BadBlock, Disk as Counts, DiskDone};
use crate::job::{DiskJob, Lasts, MOST_DEPTH, MOST_UNDER_WAY, Operation, Order};
use crate::pattern::Random;
use crate::traps::Signal;
use crate::tsc;

const SIZE_MAX: u64 = 1 << 1;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const DO_FLUSH: u32 = 4;
const DO_DISCARD: u32 = 11;
const DO_WRITE_ZEROES: u32 = 13;
/// A request's status before the device has written it.
const UNANSWERED: u8 = 0xff;

const SECTORS: u64 = BLOCK / 512;
/// A request's data is handed over in pieces, as a kernel's is.
const SEGMENT: u32 = 64 << 10;
/// The most parts of a request: its header, its data, its status.
const PARTS: usize = (crate::job::MOST_BYTES / SEGMENT) as usize + 2;
/// In the page of a request: where its status, what it discards, and its table of descriptors are.
const STATUS: u64 = 16;
const RANGE: u64 = 32;
const TABLE: u64 = 64;
const PAGE: u64 = 4096;

/// What the disk should hold that the table says nothing else of.
const UNKNOWN: u32 = 0;
const ZEROS: u32 = u32::MAX;
/// Bad blocks that are told; further ones are only counted.
const TOLD: usize = 8;

/// A request under way.
#[derive(Clone, Copy)]
struct Request {
    kind: u32,
    first: u64,
    blocks: u32,
    generation: u32,
    since: u64,
}

/// A job under way.
#[derive(Clone, Copy)]
struct Running {
    job: DiskJob,
    /// Blocks that are still to have their turn, if it is to end with them.
    left: u64,
    until: u64,
    since: u64,
    /// The disk as it was when the job began.
    before: Figures,
}

/// Counts since boot.
#[derive(Clone, Copy, Default)]
struct Figures {
    reads: u64,
    writes: u64,
    others: u64,
    blocks: u64,
    errors: u64,
    bad: u64,
    repeated: u64,
    known: u64,
    kicks: u64,
    interrupts: u64,
}

/// The disk.
pub struct Disk {
    pub transport: Transport,
    pub queue: Queue,
    pub rings: Rings,
    setting: Setting,
    /// Blocks there are, and how many of them are used.
    pub capacity: u64,
    pub used: u64,
    segment: u32,
    /// The page and the first data of request 0.
    pages: u64,
    data: u64,
    /// Bytes of data that each request may have now.
    stride: u64,
    /// The generation of each block.
    table: u64,
    generation: u32,
    cursor: u64,
    random: Random,
    requests: [Option<Request>; MOST_DEPTH as usize],
    /// Descriptors that a request has for its own.
    parts: u16,
    running: Option<Running>,
    figures: Figures,
    longest: u64,
    job_longest: u64,
    bad: [Option<BadBlock>; TOLD],
}

impl Disk {
    /// The first disk, of which so many bytes are used.
    pub fn find(setting: Setting, bytes: u64, window: &mut Window, arena: &mut Arena) -> Result<Self, DeviceError> {
        let mut transport = Transport::find(Kind::Block, setting.interrupts, window)?;
        negotiate(&mut transport)?;
        let rings = Rings::new(transport.queue_size(0, 256)?, arena);
        let queue = transport.queue(0, rings, Signal::Disk);
        transport.start();
        let capacity = (u64::from(transport.config(0)) | u64::from(transport.config(4)) << 32) / SECTORS;
        let used = bytes / BLOCK;
        if capacity < used {
            return Err(DeviceError::TooSmall);
        }
        let segment = if transport.has(SIZE_MAX) { transport.config(8).min(SEGMENT) & !511 } else { SEGMENT };
        let table = arena.zeroed(used * 4);
        let pages = arena.zeroed(u64::from(MOST_DEPTH) * PAGE);
        let data = arena.untouched(u64::from(MOST_UNDER_WAY));
        let parts = if transport.has(INDIRECT) { 1 } else { PARTS as u16 };
        Ok(Self {
            transport,
            queue,
            rings,
            setting,
            capacity,
            used,
            segment: segment.max(512),
            pages,
            data,
            stride: BLOCK,
            table,
            generation: 0,
            cursor: 0,
            random: Random::new(setting.seed ^ 0xd15c),
            requests: [None; MOST_DEPTH as usize],
            parts,
            running: None,
            figures: Figures::default(),
            longest: 0,
            job_longest: 0,
            bad: [None; TOLD],
        })
    }

    /// Resets the device and begins anew; nothing may be under way. Whether it works.
    pub fn restart(&mut self) -> bool {
        let kicks = self.queue.kicks;
        self.requests = [None; MOST_DEPTH as usize];
        if negotiate(&mut self.transport).is_err() {
            return false;
        }
        self.queue = self.transport.queue(0, self.rings, Signal::Disk);
        self.queue.kicks = kicks;
        self.transport.start();
        true
    }

    /// Begins a job, in place of the one that is there.
    pub fn begin(&mut self, job: DiskJob) {
        // Buffers change their places with the size of requests: what is under way ends first.
        while self.queue.under_way > 0 {
            while let Some(used) = self.queue.take() {
                self.complete(usize::from(used.head / self.parts));
            }
        }
        let now = tsc::now();
        self.stride = u64::from(job.bytes);
        self.cursor = 0;
        self.job_longest = 0;
        let until = match job.lasts {
            Lasts::Milliseconds(count) => now + self.setting.frequency.ticks(u64::from(count) * 1000),
            Lasts::Once | Lasts::Forever => u64::MAX,
        };
        let left = if job.lasts == Lasts::Once { self.used } else { u64::MAX };
        self.running = Some(Running { job, left, until, since: now, before: self.now() });
    }

    /// Whether requests are under way or to be made.
    pub fn is_busy(&self) -> bool {
        self.running.is_some() || self.queue.under_way > 0
    }

    /// Whether the job wants the console left alone.
    pub fn wants_quiet(&self) -> bool {
        self.running.is_some_and(|running| matches!(running.job.lasts, Lasts::Milliseconds(_)))
    }

    /// Makes no further requests of the job.
    pub fn stop(&mut self) {
        if let Some(running) = &mut self.running {
            running.until = 0;
        }
    }

    /// Takes back what is done and hands over what is due. The account of a job that has just ended.
    #[inline]
    pub fn step(&mut self) -> Option<DiskDone> {
        while let Some(used) = self.queue.take() {
            self.complete(usize::from(used.head / self.parts));
        }
        let mut running = self.running?;
        let slots = u16::min(running.job.depth as u16, self.queue.size() / self.parts);
        while running.left > 0 && self.queue.under_way < slots && tsc::now() < running.until {
            let Some((kind, first, blocks)) = self.choose(&running) else { break };
            self.submit(kind, first, blocks, running.job.coverage);
            running.left = running.left.saturating_sub(u64::from(blocks));
        }
        self.queue.kick();
        self.running = Some(running);
        let is_over = running.left == 0 || tsc::now() >= running.until;
        (is_over && self.queue.under_way == 0).then(|| self.end(&running))
    }

    fn end(&mut self, running: &Running) -> DiskDone {
        self.running = None;
        let (now, before) = (self.now(), running.before);
        let requests = |of: &Figures| of.reads + of.writes + of.others;
        let frequency = self.setting.frequency;
        DiskDone {
            requests: requests(&now) - requests(&before),
            bytes: (now.blocks - before.blocks) * BLOCK,
            errors: now.errors - before.errors,
            bad: now.bad - before.bad,
            repeated: now.repeated - before.repeated,
            known: now.known - before.known,
            took_us: frequency.us(tsc::now() - running.since),
            longest_us: frequency.us(self.job_longest),
            kicks: now.kicks - before.kicks,
            interrupts: now.interrupts - before.interrupts,
        }
    }

    fn now(&self) -> Figures {
        Figures { kicks: self.queue.kicks, interrupts: Signal::Disk.count(), ..self.figures }
    }

    /// Counts since boot.
    pub fn counts(&self) -> Counts {
        let Figures { reads, writes, others, errors, bad, repeated, .. } = self.figures;
        let (under_way, frequency) = (u32::from(self.queue.under_way), self.setting.frequency);
        let oldest = self.requests.iter().flatten().map(|request| request.since).min();
        let oldest_us = oldest.map_or(0, |since| frequency.us(tsc::now().saturating_sub(since)));
        let longest_us = frequency.us(self.longest);
        Counts { reads, writes, others, errors, bad, repeated, under_way, oldest_us, longest_us }
    }

    /// Bad block number `index`, if there were so many.
    pub fn bad(&self, index: usize) -> Option<BadBlock> {
        self.bad.get(index).copied().flatten()
    }

    /// The next request of a job; `None` when what is due overlaps what is under way.
    fn choose(&mut self, running: &Running) -> Option<(u32, u64, u32)> {
        let kind = match running.job.operation {
            Operation::Read => IN,
            Operation::Write => OUT,
            Operation::Mixed => match self.random.below(64) {
                0 if self.transport.has(FLUSH) => return Some((DO_FLUSH, 0, 0)),
                0..32 => IN,
                _ => OUT,
            },
        };
        let blocks = (u64::from(running.job.bytes) / BLOCK).min(self.used);
        let first = match running.job.order {
            Order::Sequential => self.cursor.min(self.used - 1),
            // Aligned to its size, as a file system's requests are.
            Order::Random => self.random.below(self.used / blocks) * blocks,
        };
        let blocks = blocks.min(self.used - first) as u32;
        let end = first + u64::from(blocks);
        if self
            .requests
            .iter()
            .flatten()
            .any(|other| first < other.first + u64::from(other.blocks) && other.first < end)
        {
            return None;
        }
        if running.job.order == Order::Sequential {
            self.cursor = if end == self.used { 0 } else { end };
        }
        Some((kind, first, blocks))
    }

    /// Hands over a request; there is a place for it.
    #[inline]
    fn submit(&mut self, kind: u32, first: u64, blocks: u32, coverage: Coverage) {
        let Some(slot) = self.requests.iter().position(Option::is_none) else { return };
        let data = self.data + slot as u64 * self.stride;
        if kind == OUT {
            self.generation += 1;
            for index in 0..u64::from(blocks) {
                let words = (data + index * BLOCK) as *mut u64;
                // SAFETY: a block's worth of this request's buffer, of which the index is one of 512 words.
                let put = |index: usize, word| unsafe { ptr::write(words.add(index), word) };
                block::write(first + index, self.setting.seed, self.generation, coverage, put);
            }
        }
        let page = self.pages + slot as u64 * PAGE;
        write_header(page, kind, first * SECTORS);
        let (mut parts, mut count) = ([Descriptor::default(); PARTS], 0);
        let mut push = |part| {
            parts[count] = part;
            count += 1;
        };
        push(Descriptor::readable(page, 16));
        let (mut at, end) = (data, data + if kind == DO_FLUSH { 0 } else { u64::from(blocks) * BLOCK });
        if matches!(kind, DO_DISCARD | DO_WRITE_ZEROES) {
            write_range(page + RANGE, first * SECTORS, blocks * SECTORS as u32);
            push(Descriptor::readable(page + RANGE, 16));
            at = end;
        }
        while at < end {
            let length = (end - at).min(u64::from(self.segment)) as u32;
            push(if kind == IN { Descriptor::writable(at, length) } else { Descriptor::readable(at, length) });
            at += u64::from(length);
        }
        push(Descriptor::writable(page + STATUS, 1));
        let parts = &parts[..count];
        self.requests[slot] = Some(Request { kind, first, blocks, generation: self.generation, since: tsc::now() });
        if self.parts == 1 {
            self.queue.offer_indirect(slot as u16, page + TABLE, parts);
        } else {
            self.queue.offer(slot as u16 * self.parts, parts);
        }
    }

    /// The request in this place and its status, unless the device has answered what it was not asked, or once more. A place that
    /// is in use again tells by its status, which nobody has written yet.
    fn answered(&mut self, slot: usize) -> Option<(Request, u8)> {
        let request = (*self.requests.get(slot)?)?;
        // SAFETY: the status in the request's page, which the device may have written.
        let status = unsafe { ptr::read_volatile((self.pages + slot as u64 * PAGE + STATUS) as *const u8) };
        if status == UNANSWERED {
            return None;
        }
        self.requests[slot] = None;
        Some((request, status))
    }

    #[inline]
    fn complete(&mut self, slot: usize) {
        let Some((request, status)) = self.answered(slot) else {
            self.figures.repeated += 1;
            self.queue.was_repeated();
            return;
        };
        let took = tsc::now() - request.since;
        self.longest = self.longest.max(took);
        self.job_longest = self.job_longest.max(took);
        let is_good = status == 0;
        self.figures.errors += u64::from(!is_good);
        match request.kind {
            IN => self.figures.reads += 1,
            OUT => self.figures.writes += 1,
            _ => self.figures.others += 1,
        }
        self.figures.blocks += u64::from(request.blocks);
        let holds = match (request.kind, is_good) {
            (IN, true) => {
                let data = self.data + slot as u64 * self.stride;
                (0..u64::from(request.blocks))
                    .for_each(|index| self.check(request.first + index, data + index * BLOCK));
                return;
            }
            (IN | DO_FLUSH, _) => return,
            (OUT, true) => request.generation,
            (DO_WRITE_ZEROES, true) => ZEROS,
            // Discarded blocks may hold anything, and so do those whose request failed.
            _ => UNKNOWN,
        };
        (request.first..request.first + u64::from(request.blocks)).for_each(|block| self.set_generation(block, holds));
    }

    fn generation(&self, block: u64) -> u32 {
        // SAFETY: the table has a number for each block that is used.
        unsafe { ptr::read((self.table as *const u32).add(block as usize)) }
    }

    fn set_generation(&mut self, block: u64, generation: u32) {
        // SAFETY: as above.
        unsafe { ptr::write((self.table as *mut u32).add(block as usize), generation) };
    }

    /// Compares a block that was read with what it should be.
    fn check(&mut self, number: u64, address: u64) {
        let expected = self.generation(number);
        // SAFETY: a block's worth of a request's buffer that the device is done with.
        let get = |index: usize| unsafe { ptr::read_volatile((address as *const u64).add(index)) };
        let bad = match block::read(number, self.setting.seed, get) {
            Content::Damaged(damage) => Some((damage.word, damage.expected, damage.found)),
            _ if expected == UNKNOWN => None,
            Content::Generation(found) if found == expected => None,
            Content::Zeros if expected == ZEROS => None,
            Content::Generation(found) => Some((block::WORDS as u32, u64::from(expected), u64::from(found))),
            Content::Zeros | Content::Foreign => Some((0, number, get(0))),
        };
        match bad {
            None => self.figures.known += u64::from(expected != UNKNOWN),
            Some((word, expected, found)) => {
                let told = self.bad.get_mut(self.figures.bad as usize);
                told.map(|told| *told = Some(BadBlock { block: number, word, expected, found }));
                self.figures.bad += 1;
            }
        }
    }

    /// Hands over one request that is not a job's. False when the disk cannot do it, or is busy.
    fn one(&mut self, kind: u32, feature: u64, first: u64, blocks: u32) -> bool {
        let is_possible = self.transport.has(feature)
            && !self.is_busy()
            && first.checked_add(u64::from(blocks)).is_some_and(|end| end <= self.used);
        if is_possible {
            let job = DiskJob {
                operation: Operation::Read,
                order: Order::Sequential,
                bytes: BLOCK as u32,
                depth: 1,
                lasts: Lasts::Once,
                coverage: Coverage::Full,
            };
            // A job that makes no requests of its own ends with this one.
            self.begin(job);
            self.running.as_mut().map(|running| running.left = 0);
            self.submit(kind, first, blocks, Coverage::Full);
        }
        is_possible
    }

    /// Has the disk keep what was written.
    pub fn flush(&mut self) -> bool {
        self.one(DO_FLUSH, FLUSH, 0, 0)
    }

    /// Gives blocks back.
    pub fn discard(&mut self, first: u64, blocks: u32) -> bool {
        self.one(DO_DISCARD, DISCARD, first, blocks)
    }

    /// Has blocks written with zeros.
    pub fn zero(&mut self, first: u64, blocks: u32) -> bool {
        self.one(DO_WRITE_ZEROES, WRITE_ZEROES, first, blocks)
    }

    /// The page of request 0, for a request that is like no other: its header, status and data.
    pub fn scratch(&mut self) -> (u64, u64, u64) {
        write_header(self.pages, IN, 0);
        (self.pages, self.pages + STATUS, self.data)
    }
}

fn negotiate(transport: &mut Transport) -> Result<(), DeviceError> {
    transport.negotiate(SIZE_MAX | FLUSH | DISCARD | WRITE_ZEROES | INDIRECT | EVENT_INDEX)
}

fn write_header(page: u64, kind: u32, sector: u64) {
    // SAFETY: the page is a request's own, and none that is under way.
    unsafe {
        ptr::write_volatile(page as *mut [u32; 2], [kind, 0]);
        ptr::write_volatile((page + 8) as *mut u64, sector);
        ptr::write_volatile((page + STATUS) as *mut u8, UNANSWERED);
    }
}

fn write_range(address: u64, sector: u64, sectors: u32) {
    // SAFETY: in the page of a request that is not under way.
    unsafe {
        ptr::write_volatile(address as *mut u64, sector);
        ptr::write_volatile((address + 8) as *mut [u32; 2], [sectors, 0]);
    }
}
