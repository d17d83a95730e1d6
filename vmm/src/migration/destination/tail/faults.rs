//! The thread that the guest waits for: hears of its faults, asks for what is missing, and lands what comes.
//!
//! It is one thread, since each that has to be woken takes its time, and it never waits for the rest of a frame: a guest that
//! touches a hole, or needs another page, does not stand still because a connection does.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};

use super::Tail;
use crate::migration::busy_poll::{BusyPoll, sleep};
use crate::migration::destination::DestinationError;
use crate::migration::link::Link;
use crate::migration::precedence::BURST;
use crate::migration::stoppable::Stoppable;
use crate::migration::wire::message::{Incoming, send_ranges};
use crate::migration::wire::{FrameBuffer, FrameWriter, Message, WireError};
use crate::ram::{MissingRam, RamError};

/// How long to leave alone what could not be done: the guest waits meanwhile.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

enum Order {
    /// Ask over this connection from now on, for what is waited for already, too.
    Serve(Link),
    /// Land nothing more that comes over the connection, and say so.
    Leave(SyncSender<()>),
    End,
}

/// Tells the thread what to do.
#[derive(Clone)]
struct Bell {
    orders: Sender<Order>,
    event: Arc<OwnedFd>,
}

impl Bell {
    fn tell(&self, order: Order) {
        // A thread that has ended has nothing on its way, and needs no orders.
        let _ = self.orders.send(order);
        // The counter would have to be at its limit for this to fail, and then the event is set.
        let _ = rustix::io::write(&*self.event, &1_u64.to_ne_bytes());
    }
}

/// That thread, seen by who holds it. It ends with this.
pub(super) struct FaultHandler {
    bell: Bell,
    /// The connection that it uses.
    link: Option<Link>,
    _thread: Stoppable,
}

impl FaultHandler {
    /// Starts it, without a connection.
    pub(super) fn start(tail: &Arc<Tail>, missing: &Arc<MissingRam>) -> Result<Self, DestinationError> {
        let failed = |e: &dyn std::fmt::Display| DestinationError::Thread(e.to_string());
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| failed(&e))?);
        let (sender, orders) = channel();
        let bell = Bell { orders: sender, event: Arc::clone(&event) };
        let ender = bell.clone();
        let worker = Worker {
            tail: Arc::clone(tail),
            missing: Arc::clone(missing),
            orders,
            event,
            channel: None,
            touched: VecDeque::new(),
            busy_poll: BusyPoll::default(),
        };
        let thread = Stoppable::spawn("faults", move || ender.tell(Order::End), move || worker.run());
        Ok(Self { bell, link: None, _thread: thread.map_err(|e| failed(&e))? })
    }

    /// Has it ask over `link`.
    pub(super) fn serve(&mut self, link: Link) -> Result<(), WireError> {
        self.link = Some(link.try_clone()?);
        self.bell.tell(Order::Serve(link));
        Ok(())
    }

    /// Ends its connection. When this returns, nothing that came over it is still on its way into guest RAM.
    pub(super) fn leave(&mut self) {
        let Some(link) = self.link.take() else { return };
        link.shutdown(Shutdown::Both);
        let (done, is_done) = sync_channel(1);
        self.bell.tell(Order::Leave(done));
        // An error: it has ended, and nothing is on its way.
        let _ = is_done.recv();
    }
}

/// A connection, and what has come over it.
struct Channel {
    link: Link,
    arrived: FrameBuffer,
}

struct Worker {
    tail: Arc<Tail>,
    missing: Arc<MissingRam>,
    orders: Receiver<Order>,
    event: Arc<OwnedFd>,
    channel: Option<Channel>,
    /// Pages that were touched and have not been asked for or filled in yet.
    touched: VecDeque<u64>,
    busy_poll: BusyPoll,
}

/// What there is to do.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    orders: bool,
    faults: bool,
    arrivals: bool,
}

impl Worker {
    fn run(mut self) {
        loop {
            match self.step() {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    // The guest waits; nothing wrong is ever shown to it.
                    tracing::error!("a page fault of the guest could not be handled: {e}");
                    std::thread::sleep(AGAIN_AFTER);
                }
            }
        }
    }

    /// Does what there is to do; whether to go on.
    fn step(&mut self) -> Result<bool, RamError> {
        if !self.touched.is_empty() {
            self.handle_faults()?;
        }
        let due = self.wait();
        if due.orders && !self.obey() {
            return Ok(false);
        }
        if due.faults {
            self.handle_faults()?;
        }
        if due.arrivals
            && let Err(e) = self.receive()
        {
            self.close(&e.into());
        }
        // Whoever faults meanwhile need not wait until all that has come has landed.
        loop {
            match self.land_next() {
                Ok(true) => self.handle_faults()?,
                Ok(false) => return Ok(true),
                Err(e) => self.close(&e),
            }
        }
    }

    /// The connection is of no use any more.
    fn close(&mut self, why: &DestinationError) {
        tracing::debug!("the channel for pages that are waited for has ended: {why}");
        self.channel = None;
        let mut state = self.tail.lock();
        state.asks = None;
        // One channel alone is of no use: whoever receives the other sees that it is over.
        if let Some(writer) = &mut state.confirms {
            writer.link().shutdown(Shutdown::Both);
        }
    }

    fn wait(&mut self) -> Due {
        let mut fds = vec![PollFd::new(&*self.event, PollFlags::IN), PollFd::new(&*self.missing, PollFlags::IN)];
        fds.extend(self.channel.as_ref().map(|channel| PollFd::new(&channel.link, PollFlags::IN)));
        let waited = self.busy_poll.look(&mut fds, None).and_then(|ready| {
            if ready || sleep(&mut fds, Some(BURST))? {
                return Ok(true);
            }
            self.tail.precedence.give_back();
            sleep(&mut fds, None)
        });
        if let Err(e) = waited {
            tracing::error!("waiting for page faults failed: {e}");
            std::thread::sleep(AGAIN_AFTER);
        }
        let is_ready = |place: usize| fds.get(place).is_some_and(|fd| !fd.revents().is_empty());
        Due { orders: is_ready(0), faults: is_ready(1), arrivals: is_ready(2) }
    }

    /// Does as it is told; whether to go on.
    fn obey(&mut self) -> bool {
        // Read, so that it is not readable any more; what it counts does not matter.
        let _ = rustix::io::read(&*self.event, &mut [0_u8; 8]);
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Serve(link) => self.serve(link),
                Order::Leave(done) => {
                    self.channel = None;
                    // Nobody waits for it any more.
                    let _ = done.send(());
                }
                Order::End => return false,
            }
        }
        true
    }

    fn serve(&mut self, link: Link) {
        let mut state = self.tail.lock();
        let wanted = state.missing.wanted_pages();
        let asked = link.try_clone().map_err(WireError::from).and_then(|writer| {
            let mut writer = FrameWriter::new(writer);
            if !wanted.is_empty() {
                send_ranges(&wanted, &mut writer, |ranges, _| Message::Want(ranges))?;
            }
            Ok(writer)
        });
        state.asks = asked.inspect_err(|e| tracing::debug!("nothing can be asked for: {e}")).ok();
        // A connection that has failed is seen to have ended when it is read.
        self.channel = Some(Channel { link, arrived: FrameBuffer::default() });
    }

    fn handle_faults(&mut self) -> Result<(), RamError> {
        let known = self.touched.len();
        self.missing.read(|page| self.touched.push_back(page))?;
        if self.touched.len() > known {
            self.busy_poll.stay_awake();
        }
        // The kernel tells of each once: one that cannot be handled now is tried again.
        while let Some(page) = self.touched.front() {
            self.tail.fault(&self.missing, *page)?;
            self.touched.pop_front();
        }
        Ok(())
    }

    /// Takes what has come.
    fn receive(&mut self) -> Result<(), WireError> {
        let Some(channel) = &mut self.channel else { return Ok(()) };
        if channel.arrived.fill(|room| channel.link.read_now(room))? {
            self.busy_poll.stay_awake();
        }
        Ok(())
    }

    /// Lands one batch of what has come; whether there was a whole one.
    fn land_next(&mut self) -> Result<bool, DestinationError> {
        let Some(channel) = &mut self.channel else { return Ok(false) };
        let Some(frame) = channel.arrived.next_frame()? else { return Ok(false) };
        match Incoming::decode(frame, self.tail.ram.pages())? {
            Incoming::Pages(batch) => self.tail.land(&self.missing, batch, frame.payload)?,
            Incoming::Message(other) => {
                return Err(WireError::Unexpected { found: other.name(), expected: "pages" }.into());
            }
        }
        Ok(true)
    }
}
