//! A guest that is to come in: listens, takes one connection, and receives in a thread of its own.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use memory_agent::ByteSize;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::serial::ConsoleOutput;
use crate::host;
use crate::kvm::KvmError;
use crate::machine::{self, Machine, MachineError};
use crate::migration::cancel::Cancel;
use crate::migration::destination::{self, DestinationError, Door, Tail};
use crate::migration::link::Listener;
use crate::migration::wire::{Offer, Refusal, RefusalReason};
use crate::ram::GuestRam;
use crate::ram::layout::{MAX_RAM, RamLayout};

/// What becomes of a guest that comes in.
#[derive(Debug)]
pub enum Arrival {
    /// It runs here; with a tail, not all of its memory is here yet.
    Running(Arc<Machine>, Option<Arc<Tail>>),
    /// All of its memory is here.
    Whole,
    /// It does not come.
    Failed(DestinationError),
}

/// What this host allows a guest that comes in.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most guest RAM.
    pub memory: ByteSize,
    /// How long a source may stay away whose pages follow the guest.
    pub patience: Duration,
}

impl Default for Limits {
    /// What this host has of memory and swap, and half a minute.
    fn default() -> Self {
        Self { memory: host::memory_and_swap().unwrap_or(ByteSize(MAX_RAM)), patience: Duration::from_secs(30) }
    }
}

/// A guest that is to come in.
#[derive(Debug)]
pub struct Incoming {
    /// Until somebody has connected.
    listener: Option<Listener>,
    limits: Limits,
    console: Option<Console>,
    shared: Arc<Shared>,
}

struct Console(ConsoleOutput);

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}

#[derive(Debug)]
struct Shared {
    cancel: Cancel,
    results: Mutex<VecDeque<Arrival>>,
    arrival: EventFd,
}

impl Shared {
    fn report(&self, result: Arrival) {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).push_back(result);
        // The counter would have to be at its limit for this to fail, and then the event is set.
        let _ = self.arrival.write(1);
    }
}

impl Incoming {
    /// Waits on `listener` for a guest that gets this console.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(listener: Listener, limits: Limits, console: ConsoleOutput) -> io::Result<Self> {
        let shared =
            Shared { cancel: Cancel::default(), results: Mutex::default(), arrival: EventFd::new(libc::EFD_NONBLOCK)? };
        Ok(Self { listener: Some(listener), limits, console: Some(Console(console)), shared: Arc::new(shared) })
    }

    /// The socket to wait on, until somebody has connected.
    pub fn listener(&self) -> Option<&Listener> {
        self.listener.as_ref()
    }

    /// Readable once there is news.
    pub fn arrival(&self) -> &EventFd {
        &self.shared.arrival
    }

    /// The next news of the guest, if there is any.
    pub fn news(&self) -> Option<Arrival> {
        // Not set when there was none.
        let _ = self.shared.arrival.read();
        let mut results = self.shared.results.lock().unwrap_or_else(PoisonError::into_inner);
        let next = results.pop_front();
        if !results.is_empty() {
            let _ = self.shared.arrival.write(1);
        }
        next
    }

    /// Gives up, if the guest is not here yet.
    pub fn cancel(&self) {
        self.shared.cancel.cancel();
    }

    /// Takes the connection that has come and receives the guest over it. Nobody else is listened to any more, but for the same
    /// source when pages follow the guest: one guest a process.
    pub fn accept(&mut self) {
        let (Some(Console(console)), Some(listener)) = (self.console.take(), self.listener.take()) else { return };
        let link = match listener.accept() {
            Ok(link) => link,
            Err(e) => return self.shared.report(Arrival::Failed(e.into())),
        };
        let limits = self.limits;
        let door = Door { address: listener.address(), patience: limits.patience };
        drop(listener);
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new().name("incoming".into()).spawn(move || {
            let prepare = |offer: &Offer| prepare(offer, limits, console).map(Arc::new);
            match destination::receive(link, door, &shared.cancel, prepare) {
                Ok(arrived) => {
                    shared.report(Arrival::Running(Arc::clone(arrived.machine()), arrived.tail()));
                    arrived.settle();
                    shared.report(Arrival::Whole);
                }
                Err(e) => shared.report(Arrival::Failed(e)),
            }
        });
        if let Err(e) = spawned {
            self.shared.report(Arrival::Failed(DestinationError::Thread(e.to_string())));
        }
    }
}

/// Makes the machine that is offered, or says why not.
fn prepare(offer: &Offer, limits: Limits, console: ConsoleOutput) -> Result<Machine, Refusal> {
    let refuse = |reason, text: String| Refusal { reason, text };
    let description = &offer.machine;
    let bytes = description.ram.bytes();
    if ByteSize(bytes) > limits.memory {
        let text = format!("the machine has {} of memory, this host takes {} at most", ByteSize(bytes), limits.memory);
        return Err(refuse(RefusalReason::Memory, text));
    }
    if bytes == 0 || description.ram != RamLayout::new(bytes) {
        return Err(refuse(
            RefusalReason::Memory,
            "the machine's memory is laid out in a way that cannot be here".into(),
        ));
    }
    if description.cpus == 0 {
        return Err(refuse(RefusalReason::Cpu, "the machine has no vCPU".into()));
    }
    let obstacles = machine::obstacles(description).map_err(|e| refuse(RefusalReason::Host, e.to_string()))?;
    if let Some((reason, _)) = obstacles.first() {
        let text = obstacles.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("; ");
        return Err(refuse(*reason, text));
    }
    let ram = GuestRam::new(bytes).map_err(|e| refuse(RefusalReason::Memory, e.to_string()))?;
    let machine = Machine::new(Arc::new(ram), description.cpus, Some(&description.processor), console);
    machine.map_err(|e| match e {
        MachineError::Kvm(KvmError::TscFrequency { .. }) => refuse(RefusalReason::Cpu, e.to_string()),
        _ => refuse(RefusalReason::Host, e.to_string()),
    })
}
