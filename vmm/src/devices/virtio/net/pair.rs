//! The thread of one pair of queues, which serves both, the tap's queue that belongs to them and, in the first, the control queue.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::epoll::EventSet;

use super::announce::Schedule;
use super::link::Link;
use super::receive::{self, Receiver};
use super::transmit::{self, Transmitter};
use super::{control, features};
use crate::devices::virtio::{Activation, DeviceFault, Events, Handler, QueueLock};

/// By which the worker learns of the tap, and that it is time for an announcement.
const TAP: u64 = 0;
const ANNOUNCEMENT: u64 = 1;

/// A pair of queues.
pub(super) struct Pair {
    activation: Activation,
    link: Arc<Link>,
    /// Its number, which is that of the tap's queue too.
    number: u16,
    /// Index of the control queue, if it is served here.
    control: Option<u16>,
    /// How many pairs there may be.
    pairs: u16,
    receiver: Receiver,
    transmitter: Transmitter,
    /// What is waited for at the tap, or nothing more because it has gone.
    interest: Option<EventSet>,
    has_buffers: bool,
    is_full: bool,
    /// When to announce a guest that has come from elsewhere: in the first pair.
    announcements: Option<Schedule>,
}

/// A descriptor as a number, which is what the worker's events take.
struct Raw(RawFd);

impl AsRawFd for Raw {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Pair {
    pub(super) fn new(
        activation: &Activation,
        link: &Arc<Link>,
        number: u16,
        control: Option<u16>,
        pairs: u16,
    ) -> Self {
        let ram = &activation.ram;
        Self {
            activation: activation.clone(),
            link: Arc::clone(link),
            number,
            control,
            pairs,
            receiver: Receiver::new(ram, activation.has(features::MRG_RXBUF)),
            transmitter: Transmitter::new(ram),
            interest: None,
            has_buffers: false,
            is_full: false,
            announcements: None,
        }
    }

    /// Index of the queue of buffers for what arrives; the one behind it is of what is sent.
    fn receive_queue(&self) -> u16 {
        2 * self.number
    }

    fn receive(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let Self { activation, link, receiver, .. } = self;
        let Some(tap) = link.tap().queue(self.number.into()) else { return Ok(()) };
        let mut queue = lock(activation, 2 * self.number);
        if !queue.is_ready() || self.interest.is_none() {
            return Ok(());
        }
        let stopped = receiver.receive(&mut queue, tap)?;
        drop(queue);
        self.has_buffers = !matches!(stopped, receive::Stopped::NoBuffers);
        match stopped {
            receive::Stopped::Lost(cause) => self.lose(&cause, events),
            _ => self.wait_for_tap(events),
        }
    }

    fn transmit(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let Self { activation, link, transmitter, .. } = self;
        let index = 2 * self.number + 1;
        let tap = link.tap().queue(self.number.into()).filter(|_| self.interest.is_some());
        let mut queue = lock(activation, index);
        if !queue.is_ready() {
            return Ok(());
        }
        let is_readable = || self.interest.is_some_and(|set| set.contains(EventSet::IN)) && tap.is_some_and(has_frame);
        let stopped = transmitter.transmit(&mut queue, tap, is_readable)?;
        drop(queue);
        self.is_full = matches!(stopped, transmit::Stopped::Full);
        if matches!(stopped, transmit::Stopped::Turn | transmit::Stopped::Lost(_)) {
            // Fails only where it is set already.
            let _ = activation.queues[usize::from(index)].kick().write(1);
        }
        match stopped {
            transmit::Stopped::Lost(cause) => self.lose(&cause, events),
            _ => self.wait_for_tap(events),
        }
    }

    /// Waits for frames only while there is room for them, and for room in the tap only while it has none: the kernel would tell of
    /// both again and again.
    fn wait_for_tap(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let bit = |is_wanted: bool, event: EventSet| if is_wanted { event } else { EventSet::empty() };
        let wanted = bit(self.has_buffers, EventSet::IN) | bit(self.is_full, EventSet::OUT);
        if self.interest.is_none_or(|interest| interest == wanted) {
            return Ok(());
        }
        self.interest = Some(wanted);
        self.with_tap(|tap| events.modify(tap, wanted, TAP))
    }

    fn lose(&mut self, cause: &std::io::Error, events: &Events) -> Result<(), DeviceFault> {
        self.link.lose(cause);
        self.is_full = false;
        if self.interest.take().is_none() {
            return Ok(());
        }
        self.with_tap(|tap| events.remove(tap))
    }

    /// Announces the guest if it is time. It touches no guest memory, for a page of which it might have to wait.
    fn announce(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let Some(schedule) = &mut self.announcements else { return Ok(()) };
        if schedule.is_due() {
            self.link.announce();
        }
        if !schedule.is_over() {
            return Ok(());
        }
        let removed = events.remove(schedule.timer());
        self.announcements = None;
        removed.map_err(|cause| DeviceFault::Host { what: "epoll_ctl", cause })
    }

    fn with_tap(&self, call: impl FnOnce(&Raw) -> std::io::Result<()>) -> Result<(), DeviceFault> {
        let Some(tap) = self.link.tap().queue(self.number.into()) else { return Ok(()) };
        call(&raw(tap)).map_err(|cause| DeviceFault::Host { what: "epoll_ctl", cause })
    }
}

fn raw(fd: BorrowedFd<'_>) -> Raw {
    Raw(fd.as_raw_fd())
}

/// Whether a frame can be read.
fn has_frame(tap: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(tap, PollFlags::IN)];
    // Whatever is wrong with the tap shows where it is waited for.
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

fn lock(activation: &Activation, index: u16) -> QueueLock<'_> {
    let Activation { ram, notify, queues, .. } = activation;
    queues[usize::from(index)].lock(ram, notify.as_ref())
}

impl Handler for Pair {
    fn start(&mut self, events: &Events) -> Result<(), DeviceFault> {
        if self.number == 0 && self.link.take_new_here() {
            let schedule = Schedule::new().map_err(|cause| DeviceFault::Host { what: "timerfd_create", cause })?;
            let added = events.add(schedule.timer(), EventSet::IN, ANNOUNCEMENT);
            added.map_err(|cause| DeviceFault::Host { what: "epoll_ctl", cause })?;
            self.announcements = Some(schedule);
        }
        if self.link.is_lost() {
            return Ok(());
        }
        self.with_tap(|tap| events.add(tap, EventSet::empty(), TAP))?;
        self.interest = Some(EventSet::empty());
        Ok(())
    }

    fn resume(&mut self, events: &Events) -> Result<(), DeviceFault> {
        self.announce(events)
    }

    fn queue(&mut self, index: u16, events: &Events) -> Result<(), DeviceFault> {
        if self.control == Some(index) {
            let mut queue = lock(&self.activation, index);
            return if queue.is_ready() {
                control::serve(&mut queue, &self.activation, &self.link, self.pairs)
            } else {
                Ok(())
            };
        }
        if index == self.receive_queue() { self.receive(events) } else { self.transmit(events) }
    }

    fn event(&mut self, token: u64, set: EventSet, events: &Events) -> Result<(), DeviceFault> {
        if token == ANNOUNCEMENT {
            if let Some(schedule) = &mut self.announcements {
                schedule.take_event();
            }
            return self.announce(events);
        }
        if set.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            // What reading a queue says whose interface has been deleted.
            return self.lose(&std::io::Error::from_raw_os_error(libc::EBADFD), events);
        }
        if set.contains(EventSet::OUT) {
            self.transmit(events)?;
        }
        if set.contains(EventSet::IN) { self.receive(events) } else { Ok(()) }
    }

    fn quiesce(&mut self) -> bool {
        let mut queue = lock(&self.activation, 2 * self.number);
        self.receiver.put_back(&mut queue);
        true
    }
}
