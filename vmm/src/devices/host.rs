//! What devices take from the host: interrupts and back-ends. None of it travels.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::virtio::balloon::BalloonPort;
use crate::record::Name;

/// Whoever brings interrupts to the guest.
pub trait Interrupts: std::fmt::Debug {
    /// An event that raises the interrupt line `line` of the guest's interrupt controllers, as an edge.
    ///
    /// # Errors
    /// When the host refuses.
    fn line(&self, line: u32) -> io::Result<EventFd>;
}

/// Where a console's bytes go. Clones are the same place: a machine that does not come to life leaves it to the next.
#[derive(Clone)]
pub struct ConsoleOutput(Arc<Mutex<dyn Write + Send>>);

impl ConsoleOutput {
    /// There.
    pub fn new(output: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(output)))
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

impl std::fmt::Debug for ConsoleOutput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConsoleOutput")
    }
}

/// A device at which somebody outside types.
pub trait ConsolePort: Send + Sync + std::fmt::Debug {
    /// Gives the guest bytes that came in; returns how many it had room for.
    fn receive(&self, bytes: &[u8]) -> usize;

    /// How many bytes of input the guest has room for.
    fn room(&self) -> usize;

    /// An event that is set whenever the guest has read all its input.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    fn drained(&self) -> io::Result<EventFd>;
}

/// What this host gives to the devices of one machine, by their ids.
#[derive(Clone, Debug, Default)]
pub struct Backends {
    /// Where consoles' bytes go; nowhere for one that is not here.
    pub consoles: BTreeMap<Name, ConsoleOutput>,
}

impl Backends {
    /// Where the bytes of the console `id` go.
    pub(super) fn console(&self, id: &Name) -> ConsoleOutput {
        self.consoles.get(id).cloned().unwrap_or_else(|| ConsoleOutput::new(io::sink()))
    }
}

/// What a device is made with.
#[derive(Debug)]
pub struct Host<'a> {
    /// Whoever brings interrupts to the guest.
    pub interrupts: &'a dyn Interrupts,
    /// What else the host gives.
    pub backends: &'a Backends,
    /// What devices leave for those outside the guest who work with them.
    pub ports: Ports,
}

/// The devices of one machine that are worked with from outside, by their ids.
#[derive(Clone, Debug, Default)]
pub struct Ports {
    /// Those at which somebody types.
    pub consoles: BTreeMap<Name, Arc<dyn ConsolePort>>,
    /// The balloon, if there is one.
    pub balloon: Option<Arc<dyn BalloonPort>>,
}
