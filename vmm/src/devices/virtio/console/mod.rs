//! The console `hvc0` (VIRTIO 1.2, 5.3), one port: what the guest writes goes out a buffer at a time, where a serial port takes an
//! exit a byte.

mod serve;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, DeviceFault, VirtioDevice, Worker, Workers};
use crate::bounded::at_most;
use crate::devices::host::{ConsoleOutput, ConsolePort, Host};
use crate::devices::{DeviceDescription, DeviceError};
use serve::Serving;

/// What it is called in the table of devices.
pub const KIND: &str = "virtio-console";
/// Its type.
const TYPE: u32 = 3;
/// Receive, transmit.
const QUEUE_SIZES: [u16; 2] = [64; 2];
/// Most bytes of input that the guest has given no buffer for yet.
const MOST_INPUT: usize = 4096;

/// What a console holds besides its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct SavedConsole {
    #[serde(deserialize_with = "at_most::<_, _, MOST_INPUT>")]
    input: Vec<u8>,
}

/// Input on its way to the guest.
#[derive(Debug)]
struct Input {
    bytes: Mutex<VecDeque<u8>>,
    /// Set when there is some.
    arrived: EventFd,
    /// Set when the guest has had all of it.
    drained: EventFd,
}

impl Input {
    fn new() -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK);
        Ok(Self { bytes: Mutex::default(), arrived: event()?, drained: event()? })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn room(&self) -> usize {
        MOST_INPUT - self.lock().len()
    }

    /// Takes as many bytes as there is room for.
    fn put(&self, bytes: &[u8]) -> usize {
        let mut input = self.lock();
        let taken = bytes.len().min(MOST_INPUT - input.len());
        input.extend(&bytes[..taken]);
        // Fails only where the event is set already, as below.
        let _ = self.arrived.write(1);
        taken
    }

    /// Gives at most `most` bytes.
    fn take(&self, most: u64) -> Vec<u8> {
        let mut input = self.lock();
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
        let taken = input.drain(..most).collect();
        if input.is_empty() {
            let _ = self.drained.write(1);
        }
        taken
    }
}

/// A console with one port.
pub struct VirtioConsole {
    description: DeviceDescription,
    input: Arc<Input>,
    output: ConsoleOutput,
    workers: Workers,
}

impl std::fmt::Debug for VirtioConsole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("VirtioConsole").field(&self.description.id).finish()
    }
}

/// The device of this description.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    host: &mut Host,
) -> Result<Arc<dyn VirtioDevice>, DeviceError> {
    let console = Arc::new(VirtioConsole::new(description, host.backends.console(&description.id))?);
    host.ports.consoles.insert(description.id.clone(), Arc::clone(&console) as _);
    Ok(console)
}

impl VirtioConsole {
    /// A console whose guest writes to `output`.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(description: &DeviceDescription, output: ConsoleOutput) -> Result<Self, DeviceError> {
        let input = Input::new().map_err(|cause| DeviceError::Host { id: description.id.clone(), cause })?;
        Ok(Self { description: description.clone(), input: Arc::new(input), output, workers: Workers::default() })
    }
}

impl ConsolePort for VirtioConsole {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.input.put(bytes)
    }

    fn room(&self) -> usize {
        self.input.room()
    }

    fn drained(&self) -> io::Result<EventFd> {
        self.input.drained.try_clone()
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> u32 {
        TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceFault> {
        let serving = Serving::new(&activation, Arc::clone(&self.input), self.output.clone());
        let worker = Worker::new(self.description.id.as_str(), &activation, &activation.queues, serving)?;
        self.workers.set([worker]);
        Ok(())
    }

    fn workers(&self) -> &Workers {
        &self.workers
    }

    fn save(&self) -> Vec<u8> {
        let saved = SavedConsole { input: self.input.lock().iter().copied().collect() };
        // Some bytes: there is nothing that could fail.
        postcard::to_stdvec(&saved).unwrap_or_default()
    }

    fn restore(&self, saved: &[u8]) -> Result<(), DeviceError> {
        let SavedConsole { input } = self.description.saved(saved)?;
        *self.input.lock() = input.into();
        Ok(())
    }
}
