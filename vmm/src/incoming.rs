//! A guest that is to come in: the machine that is made for it, and the news of it for the event loop.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memory_agent::ByteSize;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::host::Backends;
use crate::host;
use crate::machine::{BuildError, Builder, Incompatibility, Machine, MachineError};
use crate::migration::destination::{Arrival, Reception, Terms};
use crate::migration::link::Listener;
use crate::migration::wire::{Offer, Refusal, RefusalReason};
use crate::ram::layout::MAX_RAM;

/// What this host allows a guest that comes in.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most guest RAM.
    pub memory: ByteSize,
    /// How it is received.
    pub terms: Terms,
}

impl Default for Limits {
    /// What this host has of memory and swap; half a minute for a source that is away; and whoever does not bring a guest is
    /// followed by the next.
    fn default() -> Self {
        let terms = Terms { source_timeout: Duration::from_secs(30), once: false };
        Self { memory: host::memory_and_swap().unwrap_or(ByteSize(MAX_RAM)), terms }
    }
}

/// A guest that is to come in.
#[derive(Debug)]
pub struct Incoming {
    reception: Reception<Machine>,
    news: Arc<News>,
}

/// What has become of it and has not been heard yet.
#[derive(Debug)]
struct News {
    arrivals: Mutex<VecDeque<Arrival<Machine>>>,
    event: EventFd,
}

impl News {
    fn report(&self, arrival: Arrival<Machine>) {
        self.lock().push_back(arrival);
        // The counter would have to be at its limit for this to fail, and then the event is set.
        let _ = self.event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arrival<Machine>>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Incoming {
    /// Waits on `listener` for a guest whose devices get these back-ends.
    ///
    /// # Errors
    /// When the host has no descriptor or thread left.
    pub fn new(listener: Listener, limits: Limits, backends: Backends) -> io::Result<Self> {
        let news = Arc::new(News { arrivals: Mutex::default(), event: EventFd::new(libc::EFD_NONBLOCK)? });
        let told = Arc::clone(&news);
        let reception = Reception::open(
            listener,
            limits.terms,
            move |offer| prepare(offer, limits.memory, &backends),
            move |arrival| told.report(arrival),
        )?;
        Ok(Self { reception, news })
    }

    /// Readable once there is news.
    pub fn arrival(&self) -> &EventFd {
        &self.news.event
    }

    /// The next news of the guest, if there is any.
    pub fn news(&self) -> Option<Arrival<Machine>> {
        // Not set when there was none.
        let _ = self.news.event.read();
        let mut arrivals = self.news.lock();
        let next = arrivals.pop_front();
        if !arrivals.is_empty() {
            let _ = self.news.event.write(1);
        }
        next
    }

    /// Gives up, if the guest is not here yet.
    pub fn cancel(&self) {
        self.reception.cancel();
    }
}

/// Makes the machine that is offered, or says why not.
fn prepare(offer: &Offer, most: ByteSize, backends: &Backends) -> Result<Machine, Refusal> {
    let builder = Builder::new(backends.clone());
    builder.described(&offer.machine, most).map_err(|e| Refusal { reason: reason_of(&e), text: e.to_string() })
}

/// What to tell the source: the class of the first reason.
fn reason_of(error: &BuildError) -> RefusalReason {
    match error {
        BuildError::Incompatible(reasons) => match reasons.first() {
            Some(Incompatibility::Memory { .. } | Incompatibility::Layout) => RefusalReason::Memory,
            Some(Incompatibility::NoCpu | Incompatibility::Cpus { .. } | Incompatibility::Processor(_)) => {
                RefusalReason::Cpu
            }
            Some(Incompatibility::Device(_)) => RefusalReason::Devices,
            None => RefusalReason::Host,
        },
        BuildError::Machine(MachineError::Ram(_)) => RefusalReason::Memory,
        BuildError::Machine(_) => RefusalReason::Host,
    }
}
