//! What devices take from the host: interrupts and back-ends. None of it travels.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::pci::PciBus;
use super::virtio::balloon::BalloonPort;
use super::virtio::block::{self, DiskBackend};
use super::virtio::net::NetBackend;
use super::virtio::vsock::VsockSocket;
use super::{DeviceDescription, DeviceError};
use crate::ram::GuestRam;
use crate::record::Name;

/// Whoever brings interrupts to the guest.
pub trait Interrupts: Send + Sync + Debug {
    /// An event that raises the interrupt line `line` of the guest's interrupt controllers, as an edge.
    ///
    /// # Errors
    /// When the host refuses.
    fn line(&self, line: u32) -> io::Result<EventFd>;

    /// The message interrupts of one device, numbered from 0. None has a message yet.
    ///
    /// # Errors
    /// When there are no more.
    fn messages(&self, count: u16) -> io::Result<Arc<dyn MessageInterrupts>>;
}

/// What a message interrupt writes: where, and what (PCI Local Bus Specification 3.0, 6.8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Guest physical address.
    pub address: u64,
    /// The value.
    pub data: u32,
}

/// Interrupts of one device, each of which is a message of its own.
pub trait MessageInterrupts: Send + Sync + Debug {
    /// Has these interrupts send these messages from now on; all at once, since each time costs the same. Those that have them
    /// already cost nothing.
    ///
    /// # Errors
    /// When the host refuses.
    fn route(&self, messages: &[(u16, Message)]) -> io::Result<()>;

    /// Sends the message of an interrupt. One that has none is lost.
    ///
    /// # Errors
    /// When the host refuses.
    fn trigger(&self, interrupt: u16) -> io::Result<()>;
}

/// Whoever sees the guest write to an address, without a vCPU thread's help (`KVM_IOEVENTFD`).
pub trait IoEvents: Send + Sync + Debug {
    /// Sets `event` whenever the guest writes to `address`, in whatever width. No register there hears of it.
    ///
    /// # Errors
    /// When the host refuses, such as for an address that has an event.
    fn add(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// No more.
    ///
    /// # Errors
    /// When there is no such event.
    fn remove(&self, address: u64, event: &EventFd) -> io::Result<()>;
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

/// A button that somebody outside presses.
pub trait ButtonPort: Send + Sync + Debug {
    /// Presses it: the guest hears of it at once, or when it goes on.
    ///
    /// # Errors
    /// When the host refuses.
    fn press(&self) -> io::Result<()>;
}

/// What this host gives to the devices of one machine, by their ids.
#[derive(Clone, Debug, Default)]
pub struct Backends {
    /// Where consoles' bytes go; nowhere for one that is not here.
    pub consoles: BTreeMap<Name, ConsoleOutput>,
    /// Whether the guest runs elsewhere and is to come: what only one host may have is taken from there then.
    pub are_elsewhere: bool,
    /// The images of disks. They are opened, and locked, when a machine is made.
    pub disks: BTreeMap<Name, DiskBackend>,
    /// The other ends of network interfaces.
    pub nets: BTreeMap<Name, NetBackend>,
    /// Where programs of the host come to the guest's sockets.
    pub vsocks: BTreeMap<Name, Arc<VsockSocket>>,
}

impl Backends {
    /// Disks that a machine with these devices does not have.
    pub fn superfluous(&self, devices: &[DeviceDescription]) -> Vec<DeviceError> {
        let is_there = |id: &Name| devices.iter().any(|device| device.id == *id && device.kind.as_str() == block::KIND);
        self.disks.keys().filter(|id| !is_there(id)).map(|id| DeviceError::Superfluous(id.clone())).collect()
    }

    /// Where the bytes of the console `id` go.
    pub(super) fn console(&self, id: &Name) -> ConsoleOutput {
        self.consoles.get(id).cloned().unwrap_or_else(|| ConsoleOutput::new(io::sink()))
    }
}

/// What a device is made with.
#[derive(Debug)]
pub struct Host {
    /// Whoever brings interrupts to the guest.
    pub interrupts: Arc<dyn Interrupts>,
    /// Whoever sees its writes.
    pub io_events: Arc<dyn IoEvents>,
    /// Its RAM.
    pub ram: Arc<GuestRam>,
    /// What else the host gives.
    pub backends: Backends,
    /// Where the host bridge, once it is made, leaves the bus for the devices on it.
    pub pci: Option<Arc<PciBus>>,
    /// What devices leave for those outside the guest who work with them.
    pub ports: Ports,
}

impl Host {
    /// Of a VM with this RAM.
    pub fn new<V: Interrupts + IoEvents + 'static>(vm: Arc<V>, ram: Arc<GuestRam>, backends: &Backends) -> Self {
        let (interrupts, backends, ports) = (Arc::clone(&vm) as _, backends.clone(), Ports::default());
        Self { interrupts, io_events: vm, ram, backends, pci: None, ports }
    }
}

/// The devices of one machine that are worked with from outside, by their ids.
#[derive(Clone, Debug, Default)]
pub struct Ports {
    /// Those at which somebody types.
    pub consoles: BTreeMap<Name, Arc<dyn ConsolePort>>,
    /// The balloon, if there is one.
    pub balloon: Option<Arc<dyn BalloonPort>>,
    /// The power button, if there is one.
    pub power_button: Option<Arc<dyn ButtonPort>>,
}
