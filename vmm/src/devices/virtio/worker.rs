//! The thread that serves a device's queues: it waits for the driver's notifications and for the device's own descriptors,
//! and comes to rest, goes on and ends as it is told.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, DeviceFault, Virtqueue};
use crate::devices::StillBusy;

/// Most events that are taken at once.
const EVENTS: usize = 32;
/// The event by which a worker is told something. A handler's own tokens are below 2^63; queues are above.
const CONTROL: u64 = u64::MAX;
const QUEUE: u64 = 1 << 63;

/// What a worker waits for besides its queues.
#[derive(Debug)]
pub struct Events {
    epoll: Epoll,
}

impl Events {
    fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()? })
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(events, token))
    }

    /// Has the handler called with `token`, below 2^63, when `fd` has one of the events.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn add(&self, fd: &impl AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.control(ControlOperation::Add, fd.as_raw_fd(), events, token)
    }

    /// Other events of the same descriptor.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn modify(&self, fd: &impl AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), events, token)
    }

    /// No more events of it.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd.as_raw_fd(), EventSet::empty(), 0)
    }
}

/// What a device does in its worker.
pub trait Handler: Send {
    /// Sets up what it waits for besides its queues. Called once, before anything else.
    ///
    /// # Errors
    /// When the host refuses.
    fn start(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let _ = events;
        Ok(())
    }

    /// The worker begins, or goes on. Called before it looks at its queues.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn resume(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let _ = events;
        Ok(())
    }

    /// The driver may have made buffers available in the queue of this index. Also called for every queue when the worker begins
    /// and when it goes on.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn queue(&mut self, index: u16, events: &Events) -> Result<(), DeviceFault>;

    /// A descriptor that was [added](Events::add) with this token has events.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn event(&mut self, token: u64, set: EventSet, events: &Events) -> Result<(), DeviceFault> {
        let _ = (token, set, events);
        Ok(())
    }

    /// Goes on with what has begun, and begins nothing; whether all of it is finished, so that nothing touches guest memory. Until then
    /// it is called again whenever something has events, unless the worker is told to go on.
    fn quiesce(&mut self) -> bool {
        true
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    Pause,
    End,
}

#[derive(Clone, Copy, Debug)]
struct State {
    order: Order,
    /// Touches neither queues nor guest memory.
    is_at_rest: bool,
    has_ended: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    control: EventFd,
    /// There is no thread: it does nothing but when it is told to, and rests in between.
    is_inline: bool,
}

impl Shared {
    fn new(control: EventFd, is_inline: bool) -> Self {
        let state = State { order: Order::Pause, is_at_rest: is_inline, has_ended: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), control, is_inline }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        let mut state = self.lock();
        if state.order != Order::End {
            state.order = order;
        }
        state.has_ended |= self.is_inline && order == Order::End;
        self.changed.notify_all();
        // Fails only where the event is set already.
        let _ = self.control.write(1);
    }

    /// Rests until the order is `least`, or to end; what the order is then.
    fn rest(&self, least: Order) -> Order {
        let mut state = self.lock();
        state.is_at_rest = true;
        self.changed.notify_all();
        let resting = |state: &mut State| state.order != least && state.order != Order::End;
        let mut state = self.changed.wait_while(state, resting).unwrap_or_else(PoisonError::into_inner);
        state.is_at_rest = state.order != Order::Run;
        state.order
    }
}

/// A thread that serves queues. It is at rest until it is [resumed](Worker::resume), and ends when it is dropped.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Worker({:?})", *self.shared.lock())
    }
}

impl Worker {
    /// A thread of this name that serves these queues of the activation with `handler`.
    ///
    /// # Errors
    /// When the host has no descriptors or no memory for it.
    pub fn new(
        name: &str,
        activation: &Activation,
        queues: &[Arc<Virtqueue>],
        handler: impl Handler + 'static,
    ) -> Result<Self, DeviceFault> {
        let host = |what| move |cause| DeviceFault::Host { what, cause };
        let events = Events::new().map_err(host("epoll_create"))?;
        let control = EventFd::new(libc::EFD_NONBLOCK).map_err(host("eventfd"))?;
        let add = |fd: RawFd, token| events.control(ControlOperation::Add, fd, EventSet::IN, token);
        add(control.as_raw_fd(), CONTROL).map_err(host("epoll_ctl"))?;
        for (number, queue) in queues.iter().enumerate() {
            add(queue.kick().as_raw_fd(), QUEUE | number as u64).map_err(host("epoll_ctl"))?;
        }
        #[cfg(feature = "fuzzing")]
        let is_inline = super::inline::is_on();
        #[cfg(not(feature = "fuzzing"))]
        let is_inline = false;
        let shared = Arc::new(Shared::new(control, is_inline));
        let serving = Serving {
            shared: Arc::clone(&shared),
            events,
            queues: queues.to_vec(),
            notify: Arc::clone(&activation.notify),
            handler,
        };
        #[cfg(feature = "fuzzing")]
        if is_inline {
            super::inline::add(Box::new(Inline { serving, result: None }));
            return Ok(Self { shared, thread: None });
        }
        let thread = crate::host::thread(name).and_then(|builder| builder.spawn(move || serving.run()));
        Ok(Self { shared, thread: Some(thread.map_err(host("a thread"))?) })
    }

    /// Lets it work.
    pub fn resume(&self) {
        self.shared.order(Order::Run);
    }

    /// Tells it to rest; waits for nothing.
    pub fn begin_pause(&self) {
        self.shared.order(Order::Pause);
    }

    /// Has it come to rest.
    ///
    /// # Errors
    /// When it is still at work at `deadline`.
    pub fn pause(&self, deadline: Instant) -> Result<(), StillBusy> {
        self.begin_pause();
        let limit = deadline.saturating_duration_since(Instant::now());
        let busy = |state: &mut State| !state.is_at_rest && !state.has_ended;
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), limit, busy);
        let (_state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() { Err(StillBusy) } else { Ok(()) }
    }

    /// Tells it to end; waits for nothing.
    pub fn end(&self) {
        self.shared.order(Order::End);
    }

    /// Whether it may still touch queues or guest memory, after [`Worker::end`].
    pub fn is_active(&self) -> bool {
        !self.shared.lock().has_ended
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread holds.
struct Serving<H> {
    shared: Arc<Shared>,
    events: Events,
    queues: Vec<Arc<Virtqueue>>,
    notify: Arc<dyn super::Notify>,
    handler: H,
}

/// Says that the thread has ended, also when it panics.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.lock().has_ended = true;
        self.0.changed.notify_all();
    }
}

impl<H: Handler> Serving<H> {
    fn run(mut self) {
        // Declared first: ends last, when the handler has gone.
        let ended = Ended(Arc::clone(&self.shared));
        let mut result = self.handler.start(&self.events);
        loop {
            if let Err(fault) = &result {
                self.notify.needs_reset(fault);
            }
            // One that has failed leaves its queues alone until it is told to end.
            let least = if result.is_err() { Order::End } else { Order::Run };
            if self.finish(least) && self.shared.rest(least) == Order::End {
                break;
            }
            result = self.serve();
        }
        drop(self);
        drop(ended);
    }

    /// Has the handler finish what has begun; gives up when the order to run comes and is `least`: one request may hang for ever.
    fn finish(&mut self, least: Order) -> bool {
        while !self.handler.quiesce() {
            let mut events = [EpollEvent::default(); EVENTS];
            let count = self.wait(-1, &mut events).unwrap_or_default();
            // All queues are looked at when it goes on.
            for token in events[..count].iter().map(EpollEvent::data).filter(|token| token & QUEUE != 0) {
                let _ = self.queues.get((token & !QUEUE) as usize).map_or(&self.shared.control, |q| q.kick()).read();
            }
            if least == Order::Run && self.shared.lock().order == Order::Run {
                return false;
            }
        }
        true
    }

    /// Works until another order comes.
    fn serve(&mut self) -> Result<(), DeviceFault> {
        self.begin()?;
        while self.take_events(-1)? != Taken::Order {}
        Ok(())
    }

    /// Begins or goes on, and looks at every queue.
    fn begin(&mut self) -> Result<(), DeviceFault> {
        self.handler.resume(&self.events)?;
        (0..self.queues.len()).try_for_each(|number| self.handler.queue(self.queues[number].index(), &self.events))
    }

    /// Waits for events so many milliseconds, or for ever with -1, and takes them.
    fn take_events(&mut self, milliseconds: i32) -> Result<Taken, DeviceFault> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = self.wait(milliseconds, &mut events)?;
        for event in &events[..count] {
            match event.data() {
                CONTROL => {
                    let _ = self.shared.control.read();
                    if self.shared.lock().order != Order::Run {
                        return Ok(Taken::Order);
                    }
                }
                token if token & QUEUE != 0 => {
                    let Some(queue) = self.queues.get((token & !QUEUE) as usize) else { continue };
                    let _ = queue.kick().read();
                    self.handler.queue(queue.index(), &self.events)?;
                }
                token => self.handler.event(token, event.event_set(), &self.events)?,
            }
        }
        Ok(if count == 0 { Taken::Nothing } else { Taken::Some })
    }

    fn wait(&self, milliseconds: i32, events: &mut [EpollEvent]) -> Result<usize, DeviceFault> {
        loop {
            match self.events.epoll.wait(milliseconds, events) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                waited => return waited.map_err(|cause| DeviceFault::Host { what: "epoll_wait", cause }),
            }
        }
    }
}

/// What came of a wait for events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    Nothing,
    Some,
    /// The worker is to do something else.
    Order,
}

/// What would be a thread's.
#[cfg(feature = "fuzzing")]
struct Inline<H> {
    serving: Serving<H>,
    /// How it went so far, once it has started.
    result: Option<Result<(), DeviceFault>>,
}

#[cfg(feature = "fuzzing")]
impl<H: Handler> Inline<H> {
    fn told<T>(&self, result: &Result<T, DeviceFault>) {
        if let Err(fault) = result {
            self.serving.notify.needs_reset(fault);
        }
    }

    fn serve(&mut self) -> Result<(), DeviceFault> {
        self.serving.begin()?;
        while self.serving.take_events(0)? == Taken::Some {}
        Ok(())
    }
}

#[cfg(feature = "fuzzing")]
impl<H: Handler> super::inline::Step for Inline<H> {
    fn step(&mut self) -> bool {
        let order = self.serving.shared.lock().order;
        if order == Order::End {
            return false;
        }
        if self.result.is_none() {
            let result = self.serving.handler.start(&self.serving.events);
            self.told(&result);
            self.result = Some(result);
        }
        if order == Order::Run && matches!(self.result, Some(Ok(()))) {
            let result = self.serve();
            self.told(&result);
            self.result = Some(result);
        }
        while !self.serving.handler.quiesce() {
            std::thread::yield_now();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::super::testing::{Driver, LIMIT, activation};
    use super::*;
    use crate::ram::GuestRam;

    /// Gives every chain back; fails where one is of three bytes.
    struct Echo {
        activation: Activation,
        ticks: EventFd,
        ticked: Arc<AtomicU32>,
    }

    impl Handler for Echo {
        fn start(&mut self, events: &Events) -> Result<(), DeviceFault> {
            events.add(&self.ticks, EventSet::IN, 7).map_err(|cause| DeviceFault::Host { what: "ticks", cause })
        }

        fn queue(&mut self, index: u16, _: &Events) -> Result<(), DeviceFault> {
            let Activation { ram, notify, queues, .. } = &self.activation;
            let mut queue = queues[usize::from(index)].lock(ram, notify.as_ref());
            while let Some(chain) = queue.pop()? {
                if chain.readable.len() == 3 {
                    return Err(DeviceFault::Queue { queue: index, why: "three bytes".into() });
                }
                queue.push(chain.head, 0)?;
            }
            queue.notify()
        }

        fn event(&mut self, token: u64, _: EventSet, _: &Events) -> Result<(), DeviceFault> {
            let _ = self.ticks.read();
            self.ticked.fetch_add(token as u32, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn it_serves_rests_goes_on_and_ends_as_it_is_told() {
        let mut driver = Driver::new(&Arc::new(GuestRam::new(1 << 20).unwrap()), 0, 16, 0);
        let (activation, notified) = activation(&[&driver], 0);
        let (ticks, ticked) = (EventFd::new(libc::EFD_NONBLOCK).unwrap(), Arc::default());
        let echo =
            Echo { activation: activation.clone(), ticks: ticks.try_clone().unwrap(), ticked: Arc::clone(&ticked) };
        let worker = Worker::new("echo", &activation, &activation.queues, echo).unwrap();

        driver.add(&[(0x8000, 1)], &[]);
        worker.pause(Instant::now() + LIMIT).unwrap();
        assert_eq!(driver.try_used(), None, "at rest");
        worker.resume();
        assert_eq!(driver.used(), Some((0, 0)), "what was there before is served without a notification");

        ticks.write(1).unwrap();
        driver.add(&[(0x8000, 1)], &[]);
        driver.kick();
        assert_eq!(driver.used(), Some((1, 0)));
        let deadline = Instant::now() + LIMIT;
        while ticked.load(Ordering::SeqCst) != 7 {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }

        worker.pause(Instant::now() + LIMIT).unwrap();
        driver.add(&[(0x8000, 3)], &[]);
        worker.resume();
        assert_eq!(notified.fault().as_deref(), Some("queue 0: three bytes"));
        driver.add(&[(0x8000, 1)], &[]);
        driver.kick();
        worker.resume();
        worker.pause(Instant::now() + LIMIT).unwrap();
        assert_eq!(
            (driver.try_used(), notified.faults().len()),
            (None, 1),
            "a fault is reported once, and nothing served"
        );

        worker.end();
        let deadline = Instant::now() + LIMIT;
        while worker.is_active() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
