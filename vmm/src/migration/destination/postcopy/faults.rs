//! The thread that the guest waits for: hears of its faults, asks for what is missing, and lands what comes.
//!
//! It is one thread, since each that has to be woken takes its time, and it never waits for the rest of a frame: a guest that
//! touches a hole, or needs another page, does not stand still because a connection does.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};

use super::landing::Unlanded;
use super::{AGAIN_AFTER, PostCopy, Stage};
use crate::host::adaptive_poll::{AdaptivePoll, sleep};
use crate::log_limit::LogLimit;
use crate::migration::destination::DestinationError;
use crate::migration::fault_priority::BURST;
use crate::migration::link::{Link, SILENCE_LIMIT};
use crate::migration::stoppable::Stoppable;
use crate::migration::wire::message::{Incoming, send_ranges};
use crate::migration::wire::{FrameBuffer, FrameWriter, Message, WireError};
use crate::ram::{RamError, RamPage};

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
    post_copy: Arc<PostCopy>,
    _thread: Stoppable,
}

impl FaultHandler {
    /// Starts it, without a connection.
    pub(super) fn start(post_copy: &Arc<PostCopy>) -> Result<Self, DestinationError> {
        let failed = |e: &dyn std::fmt::Display| DestinationError::Thread(e.to_string());
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| failed(&e))?);
        let (sender, orders) = channel();
        let bell = Bell { orders: sender, event: Arc::clone(&event) };
        let ender = bell.clone();
        let worker = Worker {
            post_copy: Arc::clone(post_copy),
            orders,
            event,
            channel: None,
            touched: VecDeque::new(),
            failed: VecDeque::new(),
            held: None,
            again_at: None,
            complaint: LogLimit::default(),
            is_restoring: true,
            adaptive_poll: AdaptivePoll::default(),
        };
        let thread = Stoppable::spawn("faults", move || ender.tell(Order::End), move || worker.run());
        Ok(Self { bell, link: None, post_copy: Arc::clone(post_copy), _thread: thread.map_err(|e| failed(&e))? })
    }

    /// Has it ask over `link`.
    pub(super) fn serve(&mut self, link: Link) -> Result<(), WireError> {
        self.link = Some(link.try_clone()?);
        self.post_copy.lock().has_lost_faults = false;
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
struct FaultChannel {
    link: Link,
    arrived: FrameBuffer,
}

struct Worker {
    post_copy: Arc<PostCopy>,
    orders: Receiver<Order>,
    event: Arc<OwnedFd>,
    channel: Option<FaultChannel>,
    /// Pages that were touched and have not been looked at yet.
    touched: VecDeque<RamPage>,
    /// Those that could not be handled: each is tried again after a while, behind everything else that there is to do.
    failed: VecDeque<RamPage>,
    /// What has come and could not land, with its bytes. Nothing more is taken from the connection meanwhile.
    held: Option<(Unlanded, Vec<u8>)>,
    /// When what could not be done is tried again.
    again_at: Option<Instant>,
    complaint: LogLimit,
    /// Whether the guest was being restored when last looked at.
    is_restoring: bool,
    adaptive_poll: AdaptivePoll,
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
        while self.step() {}
    }

    /// Does what there is to do, orders first; whether to go on.
    fn step(&mut self) -> bool {
        let due = self.wait();
        if due.orders && !self.obey() {
            return false;
        }
        if due.faults {
            self.handle_faults();
        }
        if self.again_at.is_some_and(|at| Instant::now() >= at) {
            self.try_again();
        }
        if due.arrivals
            && let Err(e) = self.receive()
        {
            self.close(&e.into());
        }
        self.check_restoring();
        // Whoever faults meanwhile need not wait until all that has come has landed.
        loop {
            match self.land_next() {
                Ok(true) => self.handle_faults(),
                Ok(false) => return true,
                Err(e) => self.close(&e),
            }
        }
    }

    /// The connection is of no use any more.
    fn close(&mut self, why: &DestinationError) {
        tracing::debug!("the channel for pages that are waited for has ended: {why}");
        self.drop_channel();
        let mut state = self.post_copy.lock();
        state.asks = None;
        state.has_lost_faults = true;
        // One channel alone is of no use: whoever receives the other sees that it is over.
        if let Some(writer) = &mut state.confirms {
            writer.link().shutdown(Shutdown::Both);
        }
        if state.stage == Stage::Restoring {
            state.stage = Stage::Failed;
            drop(state);
            // Whoever restores may wait for a page in the kernel. It goes on with zeros, and what it makes of them is thrown away.
            self.post_copy.pages.release();
        }
    }

    fn drop_channel(&mut self) {
        self.channel = None;
        if let Some((unlanded, _)) = self.held.take() {
            self.post_copy.not_landed(unlanded);
        }
    }

    /// What is restored does not wait for ever for a source that is silent.
    fn check_restoring(&mut self) {
        if !self.is_restoring {
            return;
        }
        let is_silent = {
            let state = self.post_copy.lock();
            self.is_restoring = state.stage == Stage::Restoring;
            self.is_restoring && state.since.values().any(|since| since.elapsed() > SILENCE_LIMIT)
        };
        if is_silent {
            self.close(&WireError::Silent.into());
        }
    }

    fn wait(&mut self) -> Due {
        let mut fds = vec![
            PollFd::new(&*self.event, PollFlags::IN),
            PollFd::from_borrowed_fd(self.post_copy.pages.as_fd(), PollFlags::IN),
        ];
        // While something is held, only the connection's end is news.
        let news = if self.held.is_some() { PollFlags::RDHUP } else { PollFlags::IN };
        fds.extend(self.channel.as_ref().map(|channel| PollFd::new(&channel.link, news)));
        let again = self.again_at.map(|at| at.saturating_duration_since(Instant::now()));
        let limit = again.or(self.is_restoring.then_some(SILENCE_LIMIT / 10));
        let waited = self.adaptive_poll.look(&mut fds, limit).and_then(|ready| {
            if ready || sleep(&mut fds, Some(limit.map_or(BURST, |limit| limit.min(BURST))))? {
                return Ok(true);
            }
            self.post_copy.fault_priority.give_back();
            sleep(&mut fds, limit)
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
                    self.drop_channel();
                    // Nobody waits for it any more.
                    let _ = done.send(());
                }
                Order::End => return false,
            }
        }
        true
    }

    fn serve(&mut self, link: Link) {
        let mut state = self.post_copy.lock();
        let requested = state.missing.requested_pages();
        let asked = link.try_clone().map_err(WireError::from).and_then(|writer| {
            let mut writer = FrameWriter::new(writer);
            if !requested.is_empty() {
                send_ranges(&requested, &mut writer, |ranges, _| Message::PageRequest(ranges))?;
            }
            Ok(writer)
        });
        state.asks = asked.inspect_err(|e| tracing::debug!("nothing can be asked for: {e}")).ok();
        // A connection that has failed is seen to have ended when it is read.
        self.channel = Some(FaultChannel { link, arrived: FrameBuffer::default() });
    }

    /// Handles what has been touched.
    fn handle_faults(&mut self) {
        let known = self.touched.len();
        if let Err(e) = self.post_copy.pages.read(&mut |page| self.touched.push_back(page)) {
            self.fails(&e);
        }
        if self.touched.len() > known {
            self.adaptive_poll.keep_polling();
        }
        // The kernel tells of each once: one that cannot be handled is tried again, and keeps no other waiting.
        while let Some(page) = self.touched.pop_front() {
            if let Err(e) = self.post_copy.fault(page) {
                self.failed.push_back(page);
                self.fails(&e);
            }
        }
    }

    /// Something could not be done. The guest waits; nothing wrong is ever shown to it.
    fn fails(&mut self, why: &RamError) {
        self.again_at.get_or_insert(Instant::now() + AGAIN_AFTER);
        if self.complaint.is_due() {
            tracing::error!("a page fault of the guest could not be handled, and is tried again: {why}");
        }
    }

    /// Tries once more what could not be done.
    fn try_again(&mut self) {
        self.again_at = None;
        self.touched.append(&mut self.failed);
        self.handle_faults();
        if let Some((unlanded, payload)) = self.held.take()
            && let Err(again) = self.post_copy.land_again(unlanded, &payload)
        {
            self.hold(again, payload);
        }
    }

    fn hold(&mut self, unlanded: Unlanded, payload: Vec<u8>) {
        self.fails(unlanded.why());
        self.held = Some((unlanded, payload));
    }

    /// Takes what has come.
    fn receive(&mut self) -> Result<(), WireError> {
        if self.held.is_some() {
            return Err(WireError::Closed);
        }
        let Some(channel) = &mut self.channel else { return Ok(()) };
        if channel.arrived.fill(|room| channel.link.read_now(room))? {
            self.adaptive_poll.keep_polling();
        }
        Ok(())
    }

    /// Lands one batch of what has come; whether there was a whole one, and nothing is held back.
    fn land_next(&mut self) -> Result<bool, DestinationError> {
        if self.held.is_some() {
            return Ok(false);
        }
        let Some(channel) = &mut self.channel else { return Ok(false) };
        let Some(frame) = channel.arrived.next_frame()? else { return Ok(false) };
        match Incoming::decode(frame, self.post_copy.ram.pages())? {
            Incoming::Pages(batch) => {
                if let Err(unlanded) = self.post_copy.land(&batch, frame.payload) {
                    let payload = frame.payload.to_vec();
                    self.hold(unlanded, payload);
                }
            }
            Incoming::Message(other) => {
                return Err(WireError::Unexpected { found: other.name(), expected: "pages" }.into());
            }
        }
        Ok(true)
    }
}
