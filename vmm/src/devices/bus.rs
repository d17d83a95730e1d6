//! The port bus: which device answers at which port.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::kvm::VcpuExitReason;

/// A device with registers at ports.
pub trait PortDevice: Send {
    /// Fills `data` from the register at `offset` behind the device's first port.
    fn read(&mut self, offset: u16, data: &mut [u8]);

    /// Takes `data` for the register at `offset`. With a reason, the guest ends here.
    fn write(&mut self, offset: u16, data: &[u8]) -> Option<VcpuExitReason>;
}

/// A device that the bus shares with others.
pub type SharedDevice = Arc<Mutex<dyn PortDevice>>;

/// The devices by their ports. Where none is, reads give ones and writes go nowhere, as on a PC.
#[derive(Clone, Default)]
pub struct Bus {
    devices: Arc<Vec<(Range<u16>, SharedDevice)>>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.devices.iter().map(|(ports, _)| ports)).finish()
    }
}

impl Bus {
    /// A bus with these devices, whose ports do not overlap.
    pub fn new(devices: Vec<(Range<u16>, SharedDevice)>) -> Self {
        Self { devices: Arc::new(devices) }
    }

    /// An `in` instruction of the guest.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match self.find(port) {
            Some((offset, device)) => device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// An `out` instruction of the guest.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<VcpuExitReason> {
        let (offset, device) = self.find(port)?;
        device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
    }

    fn find(&self, port: u16) -> Option<(u16, &SharedDevice)> {
        let (ports, device) = self.devices.iter().find(|(ports, _)| ports.contains(&port))?;
        Some((port - ports.start, device))
    }
}
