//! The network device (Virtio 1.2, 5.1), one queue each way: sends numbered frames, checks them, sends them back.

use super::Setting;
use super::announce::{self, Announcer};
use super::queue::{Descriptor, Queue, Rings};
use super::transport::{DeviceError, EVENT_INDEX, Kind, Transport};
use crate::arena::{self, Arena};
use crate::bars::Window;
use crate::device_report::{Net as Counts, NetDone};
use crate::frame::{self, Frame, HEAD, Sequence};
use crate::job::{Lasts, NetJob};
use crate::pattern;
use crate::traps::Signal;
use crate::tsc;

const MAC: u64 = 1 << 5;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const BUFFERS: u16 = 256;
const BUFFER: u64 = 2048;
/// Bytes of `virtio_net_hdr` in front of each frame.
const HEADER: u64 = 12;
/// Frames handed over before the device is told, and taken in before others have a turn.
const BATCH: u32 = 64;

const BROADCAST: [u8; 6] = [0xff; 6];

/// A job under way.
#[derive(Clone, Copy)]
struct Running {
    job: NetJob,
    /// Frames still to be sent, if it is to end with them.
    left: u64,
    until: u64,
    since: u64,
    before: NetDone,
}

/// The network device.
pub struct Net {
    receive: Queue,
    transmit: Queue,
    incoming: u64,
    outgoing: u64,
    /// Buffers of `outgoing` that nobody uses, as a stack.
    idle: [u16; BUFFERS as usize],
    idle_count: usize,
    /// For each of them the sum of what it carries, for frames of `summed` bytes.
    sums: [u64; BUFFERS as usize],
    summed: u32,
    pub mac: [u8; 6],
    announcer: Option<Announcer>,
    setting: Setting,
    next: u64,
    completed: u64,
    came: Sequence,
    received: u64,
    corrupt: u64,
    other: u64,
    no_room: u64,
    running: Option<Running>,
}

impl Net {
    /// The first.
    pub fn find(setting: Setting, window: &mut Window, arena: &mut Arena) -> Result<Self, DeviceError> {
        let mut transport = Transport::find(Kind::Net, setting.interrupts, window)?;
        // All of what an announcement takes, or nothing of it.
        let can_announce = transport.offered() & announce::FEATURES == announce::FEATURES;
        transport.negotiate(MAC | EVENT_INDEX | if can_announce { announce::FEATURES } else { 0 })?;
        let mut queue = |index, signal| {
            let rings = Rings::new(transport.queue_size(index, BUFFERS)?, arena);
            Ok(transport.queue(index, rings, signal))
        };
        let (receive, transmit) = (queue(RECEIVE, Signal::NetReceive)?, queue(TRANSMIT, Signal::NetTransmit)?);
        let size = u64::from(BUFFERS) * BUFFER;
        let (incoming, outgoing) = (arena.zeroed(size), arena.zeroed(size));
        let mac = (u64::from(transport.config(0)) | u64::from(transport.config(4)) << 32).to_le_bytes();
        let mac = [mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]];
        let announcer = if can_announce { Some(Announcer::new(&transport, mac, arena)?) } else { None };
        let mut net = Self {
            receive,
            transmit,
            incoming,
            outgoing,
            idle: [0; BUFFERS as usize],
            idle_count: 0,
            sums: [0; BUFFERS as usize],
            summed: 0,
            mac,
            announcer,
            setting,
            next: 0,
            completed: 0,
            came: Sequence::default(),
            received: 0,
            corrupt: 0,
            other: 0,
            no_room: 0,
            running: None,
        };
        (0..net.transmit.size()).for_each(|buffer| net.release(buffer));
        transport.start();
        (0..net.receive.size()).for_each(|buffer| net.lend(buffer));
        net.receive.kick();
        Ok(net)
    }

    /// Hands a buffer over for a frame to come.
    #[inline]
    fn lend(&mut self, buffer: u16) {
        self.receive.offer(buffer, &[Descriptor::writable(self.incoming + u64::from(buffer) * BUFFER, BUFFER as u32)]);
    }

    fn release(&mut self, buffer: u16) {
        self.idle[self.idle_count] = buffer;
        self.idle_count += 1;
    }

    fn idle_buffer(&mut self) -> Option<u16> {
        self.idle_count = self.idle_count.checked_sub(1)?;
        Some(self.idle[self.idle_count])
    }

    /// Begins a job, in place of the one that is there.
    pub fn begin(&mut self, job: NetJob) {
        let now = tsc::now();
        if let NetJob::Receive(_) | NetJob::Echo(_) = job {
            self.came = Sequence::default();
        }
        let until = match job.lasts() {
            Lasts::Milliseconds(count) => now + self.setting.frequency.ticks(u64::from(count) * 1000),
            Lasts::Once | Lasts::Forever => u64::MAX,
        };
        let left = if job.lasts() == Lasts::Once { u64::from(BUFFERS) } else { u64::MAX };
        self.running = Some(Running { job, left, until, since: now, before: self.done(now) });
    }

    /// Whether there is something to do, or frames are waited for.
    pub fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// Whether the job wants the console left alone.
    pub fn wants_quiet(&self) -> bool {
        self.running.is_some_and(|running| matches!(running.job.lasts(), Lasts::Milliseconds(_)))
    }

    /// Ends the job.
    pub fn stop(&mut self) {
        if let Some(running) = &mut self.running {
            running.until = 0;
        }
    }

    /// Asks for interrupts; whether there is something to take already.
    pub fn want_interrupt(&mut self) -> bool {
        let sends = matches!(self.running, Some(Running { job: NetJob::Send(..), .. }));
        // What was sent is of interest only to whoever wants to send more.
        self.receive.want_interrupt() | (sends && self.transmit.want_interrupt())
    }

    /// Takes back what is done and hands over what is due. The account of a job that has just ended.
    #[inline]
    pub fn step(&mut self) -> Option<NetDone> {
        while let Some(used) = self.transmit.take() {
            self.completed += 1;
            self.release(used.head);
        }
        if self.announcer.as_mut().is_some_and(Announcer::is_told) {
            self.announce();
        }
        let echo = matches!(self.running, Some(Running { job: NetJob::Echo(_), .. }));
        for _ in 0..BATCH {
            let Some(used) = self.receive.take() else { break };
            self.take_in(used.head, used.length, echo);
        }
        self.receive.kick();
        if let Some(Running { job: NetJob::Send(bytes, _), left, until, .. }) = self.running {
            let left = self.send(bytes, left, until);
            self.running.as_mut().map(|running| running.left = left);
        }
        self.transmit.kick();
        let running = self.running?;
        let (now, is_sent) = (tsc::now(), self.transmit.under_way == 0);
        let is_over = now >= running.until || matches!(running.job, NetJob::Send(..)) && running.left == 0;
        (is_over && is_sent).then(|| self.end(&running, now))
    }

    /// Sends an announcement if the device asks for one.
    pub fn announce(&mut self) {
        let Some(announcer) = &mut self.announcer else { return };
        // With all buffers under way it is asked for again, or seen with the next report.
        let Some(place) = self.idle_count.checked_sub(1) else { return };
        if let Some(frame) = announcer.look() {
            self.idle_count = place;
            self.transmit.offer(self.idle[place], &[frame]);
            self.transmit.kick();
            announcer.acknowledge();
        }
    }

    fn send(&mut self, bytes: u32, mut left: u64, until: u64) -> u64 {
        if self.summed != bytes {
            self.prepare(bytes);
        }
        for _ in 0..BATCH {
            if left == 0 || tsc::now() >= until {
                break;
            }
            let Some(buffer) = self.idle_buffer() else { break };
            let start = self.outgoing + u64::from(buffer) * BUFFER;
            let frame = arena::bytes(start + HEADER, bytes as usize);
            frame::seal(frame, BROADCAST, self.mac, self.next, self.sums[usize::from(buffer)]);
            self.next += 1;
            left -= 1;
            self.transmit.offer(buffer, &[Descriptor::readable(start, bytes + HEADER as u32)]);
        }
        left
    }

    /// Fills all buffers for frames of so many bytes. Whatever is under way is overwritten with the same.
    fn prepare(&mut self, bytes: u32) {
        let key = pattern::key(0, self.setting.seed, 0);
        for buffer in 0..BUFFERS {
            let payload =
                arena::bytes(self.outgoing + u64::from(buffer) * BUFFER + HEADER + HEAD as u64, bytes as usize - HEAD);
            for (index, word) in payload.chunks_mut(8).enumerate() {
                let random = pattern::word(key, usize::from(buffer) * 512 + index).to_le_bytes();
                word.iter_mut().zip(random).for_each(|(to, from)| *to = from);
            }
            self.sums[usize::from(buffer)] = frame::sum(payload);
        }
        self.summed = bytes;
    }

    #[inline]
    fn take_in(&mut self, buffer: u16, length: u32, echo: bool) {
        let start = self.incoming + u64::from(buffer) * BUFFER;
        let length = u64::from(length).clamp(HEADER, BUFFER) - HEADER;
        let frame = arena::bytes(start + HEADER, length as usize);
        match frame::read(frame) {
            Frame::Ours { sequence, .. } => {
                self.received += 1;
                self.came.take(sequence);
                if echo {
                    self.send_back(frame);
                }
            }
            Frame::Corrupt => self.corrupt += 1,
            Frame::Other => self.other += 1,
        }
        self.lend(buffer);
    }

    fn send_back(&mut self, frame: &[u8]) {
        let Some(buffer) = self.idle_buffer() else {
            self.no_room += 1;
            return;
        };
        self.summed = 0;
        let start = self.outgoing + u64::from(buffer) * BUFFER;
        let back = arena::bytes(start + HEADER, frame.len());
        back.copy_from_slice(frame);
        frame::turn_back(back);
        self.transmit.offer(buffer, &[Descriptor::readable(start, frame.len() as u32 + HEADER as u32)]);
    }

    fn end(&mut self, running: &Running, now: u64) -> NetDone {
        self.running = None;
        let (after, before) = (self.done(now), running.before);
        let is_receiving = !matches!(running.job, NetJob::Send(..));
        NetDone {
            sent: after.sent - before.sent,
            received: after.received - before.received,
            // The account of numbers begins with a job that receives.
            lost: if is_receiving { after.lost } else { after.lost.saturating_sub(before.lost) },
            duplicate: if is_receiving { after.duplicate } else { after.duplicate - before.duplicate },
            corrupt: after.corrupt - before.corrupt,
            took_us: self.setting.frequency.us(now - running.since),
            kicks: after.kicks - before.kicks,
            interrupts: after.interrupts - before.interrupts,
        }
    }

    fn done(&self, now: u64) -> NetDone {
        let Sequence { lost, duplicate, .. } = self.came;
        NetDone {
            sent: self.completed,
            received: self.received,
            lost,
            duplicate,
            corrupt: self.corrupt,
            took_us: self.setting.frequency.us(now),
            kicks: self.receive.kicks + self.transmit.kicks,
            interrupts: Signal::NetReceive.count() + Signal::NetTransmit.count(),
        }
    }

    /// Counts since boot.
    pub fn counts(&self) -> Counts {
        let Sequence { lost, duplicate, .. } = self.came;
        let Self { completed, received, corrupt, other, no_room, .. } = *self;
        let announced = self.announcer.as_ref().map_or(0, |announcer| announcer.count);
        Counts { sent: completed, received, lost, duplicate, corrupt, other, no_room, announced }
    }
}
