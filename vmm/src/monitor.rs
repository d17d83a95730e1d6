//! The monitor's event loop: console input, API socket, signals, news of an incoming migration, the guest's end.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::{SIGINT, SIGTERM};
use vmm_sys_util::epoll::EventSet;

use crate::PROGRAM;
use crate::console::{Consoles, Line};
use crate::control::ExitReason;
use crate::control::controller::Controller;
use crate::control::server::Server;
use crate::devices::StopReason;
use crate::incoming::Incoming;
use crate::machine::Machine;
use crate::migration::destination::{Arrival, DestinationError};

/// How a monitor ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest ended by itself.
    Guest(StopReason),
    /// SIGINT or SIGTERM.
    Interrupted,
    /// Somebody asked over the API.
    Quit,
    /// The guest runs elsewhere.
    Migrated,
    /// No guest arrived.
    NotArrived(DestinationError),
}

/// Why there is no monitor.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The event loop.
    #[error("the event loop failed: {0}")]
    Events(String),
    /// Signals, sockets and descriptors.
    #[error("{what}: {cause}")]
    Host {
        /// What was being set up.
        what: String,
        /// What the host said.
        cause: io::Error,
    },
}

impl MonitorError {
    fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |cause| Self::Host { what, cause }
    }
}

/// Everything that can happen, as event data.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Source {
    Signal,
    Ended,
    Api,
    Guest,
    Input,
    Drained,
    Arrival,
}

impl Source {
    /// What happened, and on which console's line, where it is about one.
    fn of(data: u32) -> (Option<Self>, usize) {
        let source = [Self::Signal, Self::Ended, Self::Api, Self::Guest, Self::Input, Self::Drained, Self::Arrival]
            .into_iter()
            .find(|source| *source as u32 == data & 0xff);
        (source, (data >> 8) as usize)
    }

    /// The event data of this on a console's line.
    fn of_line(self, number: u32) -> u32 {
        self as u32 | number << 8
    }
}

/// A machine's monitor.
pub struct Monitor {
    controller: Arc<Controller>,
    api: Option<Server>,
    lines: Vec<Line>,
    incoming: Option<Incoming>,
    signals: UnixStream,
    /// The guest's reset starts its machine anew.
    reboots: bool,
    /// Somebody has interrupted once while pages of a guest elsewhere were only here.
    was_warned: bool,
    outcome: Arc<Mutex<Option<Outcome>>>,
}

impl Monitor {
    /// A monitor for what `controller` holds, with these consoles and, if wanted, an API socket. SIGINT and SIGTERM end it from now
    /// on.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new(
        controller: Arc<Controller>,
        consoles: &mut Consoles,
        api_socket: Option<&Path>,
    ) -> Result<Self, MonitorError> {
        let api = api_socket
            .map(|path| {
                Server::bind(path, Arc::clone(&controller))
                    .map_err(MonitorError::host(format!("cannot listen on {}", path.display())))
            })
            .transpose()?;
        let (signals, sender) = UnixStream::pair().map_err(MonitorError::host("signals"))?;
        for signal in [SIGINT, SIGTERM] {
            let sender = sender.try_clone().map_err(MonitorError::host("signals"))?;
            signal_hook::low_level::pipe::register(signal, sender).map_err(MonitorError::host("signals"))?;
        }
        let lines = consoles.take_inputs().zip(0..);
        let lines = lines.map(|((id, input), number)| Line::new(id, input, Source::Input.of_line(number))).collect();
        Ok(Self {
            controller,
            api,
            lines,
            incoming: None,
            signals,
            reboots: true,
            was_warned: false,
            outcome: Arc::default(),
        })
    }

    /// Waits for a guest to come in.
    #[must_use]
    pub fn with_incoming(self, incoming: Incoming) -> Self {
        Self { incoming: Some(incoming), ..self }
    }

    /// With `false`, the guest's reset ends the monitor.
    #[must_use]
    pub fn with_reboots(self, reboots: bool) -> Self {
        Self { reboots, ..self }
    }

    /// Runs until something ends it.
    ///
    /// # Errors
    /// When the event loop fails.
    pub fn run(self) -> Result<Outcome, MonitorError> {
        let outcome = Arc::clone(&self.outcome);
        let failed = |e: event_manager::Error| MonitorError::Events(e.to_string());
        let mut events = EventManager::new().map_err(failed)?;
        events.add_subscriber(self);
        loop {
            if let Some(outcome) = locked(&outcome).take() {
                return Ok(outcome);
            }
            events.run().map_err(failed)?;
        }
    }

    fn end(&self, outcome: Outcome) {
        self.controller.end_post_copy();
        locked(&self.outcome).get_or_insert(outcome);
    }

    /// Watches a machine that is here: its end, and its consoles' input.
    fn attach(&mut self, machine: &Machine, ops: &mut EventOps) {
        watch(ops, machine.end_event(), Source::Guest);
        for (line, number) in self.lines.iter_mut().zip(0..) {
            if let Some(port) = machine.ports().consoles.get(line.id()) {
                line.attach(port.as_ref(), Source::Drained.of_line(number), ops);
            }
        }
    }

    /// SIGINT or SIGTERM. Whoever ends this process ends a guest that runs elsewhere, too, as long as pages of it are only here:
    /// not by the first signal.
    fn interrupted(&mut self) {
        let only_here = self.controller.only_here();
        if only_here > 0 && !self.was_warned {
            self.was_warned = true;
            // A byte a signal.
            let _ = io::Read::read(&mut &self.signals, &mut [0]);
            return PROGRAM.say(format_args!(
                "the guest runs elsewhere, and {only_here} pages that it may need are only here; interrupt again to give them and with them the guest up"
            ));
        }
        self.controller.end(ExitReason::Quit);
        if let Some(incoming) = &self.incoming {
            incoming.cancel();
        }
        self.end(Outcome::Interrupted);
    }

    fn serve_api(&self) {
        if let Some(Err(e)) = self.api.as_ref().map(Server::accept) {
            tracing::warn!("an API client could not be served: {e}");
        }
    }

    fn guest_ended(&self) {
        let Some(machine) = self.controller.machine() else { return };
        // Set again by what happens from here on.
        let _ = machine.end_event().read();
        match machine.end_reason() {
            Some(StopReason::Reset) if self.reboots => self.controller.reboot(),
            Some(reason) => self.end(Outcome::Guest(reason)),
            None => {}
        }
    }

    /// What has become of a guest that comes in.
    fn hear_of_guest(&mut self, ops: &mut EventOps) {
        match self.incoming.as_ref().and_then(Incoming::news) {
            Some(Arrival::Running(machine, post_copy)) => {
                match self.controller.set_machine(Arc::clone(&machine), post_copy) {
                    Ok(()) => self.attach(&machine, ops),
                    Err(e) => tracing::error!("a guest has come that cannot stay: {e}"),
                }
            }
            Some(Arrival::Whole) => self.controller.set_whole(),
            Some(Arrival::Failed(e)) => self.end(Outcome::NotArrived(e)),
            None => {}
        }
    }

    fn read_input(&mut self, number: usize, ops: &mut EventOps) {
        let (Some(line), Some(machine)) = (self.lines.get_mut(number), self.controller.machine()) else { return };
        if let Some(port) = machine.ports().consoles.get(line.id()) {
            line.read_input(port.as_ref(), ops);
        }
    }
}

impl MutEventSubscriber for Monitor {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.signals, Source::Signal);
        watch(ops, self.controller.ended(), Source::Ended);
        if let Some(api) = &self.api {
            watch(ops, api.listener(), Source::Api);
        }
        if let Some(incoming) = &self.incoming {
            watch(ops, incoming.arrival(), Source::Arrival);
        }
        if let Some(machine) = self.controller.machine() {
            self.attach(&machine, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let (source, number) = Source::of(events.data());
        match source {
            Some(Source::Signal) => self.interrupted(),
            Some(Source::Ended) => self.end(match self.controller.exit_reason() {
                Some(ExitReason::Migrated) => Outcome::Migrated,
                _ => Outcome::Quit,
            }),
            Some(Source::Api) => self.serve_api(),
            Some(Source::Guest) => self.guest_ended(),
            Some(Source::Input) => self.read_input(number, ops),
            Some(Source::Drained) => self.lines.get(number).into_iter().for_each(|line| line.read_on(ops)),
            Some(Source::Arrival) => self.hear_of_guest(ops),
            None => {}
        }
    }
}

fn watch<T: AsRawFd>(ops: &mut EventOps, fd: &T, source: Source) {
    if let Err(e) = ops.add(Events::with_data(fd, source as u32, EventSet::IN)) {
        tracing::error!("an event cannot be waited for: {e}");
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
