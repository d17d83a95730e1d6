//! What devices take from the host: interrupts and back-ends. None of it travels.

use std::io::{self, Write};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Whoever brings interrupts to the guest.
pub trait Interrupts {
    /// An event that raises the interrupt line `line` of the guest's interrupt controllers, as an edge.
    ///
    /// # Errors
    /// When the host refuses.
    fn line(&self, line: u32) -> io::Result<EventFd>;
}

/// Where a console's bytes go.
pub type ConsoleOutput = Box<dyn Write + Send>;

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

/// What this host gives to the devices of one machine: each is taken by the first device that asks for it.
#[derive(Default)]
pub struct Backends {
    /// Where the console's bytes go; nowhere when there is none.
    pub console: Option<ConsoleOutput>,
}

impl std::fmt::Debug for Backends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backends").field("console", &self.console.is_some()).finish()
    }
}

/// What a device is made with.
pub struct Host<'a> {
    /// Whoever brings interrupts to the guest.
    pub interrupts: &'a dyn Interrupts,
    /// What else the host gives.
    pub backends: Backends,
    /// Where the first device that can leaves itself as the machine's console.
    pub console: Option<Arc<dyn ConsolePort>>,
}

impl std::fmt::Debug for Host<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("backends", &self.backends).field("console", &self.console).finish()
    }
}
