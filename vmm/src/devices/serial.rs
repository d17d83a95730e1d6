//! COM1: a 16550A from vm-superio whose bytes go to a console.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::{PortDevice, SharedDevice};
use crate::bounded::at_most;
use crate::kvm::VcpuExitReason;
use crate::record::Saved;

/// Ports of COM1.
pub const COM1_PORTS: Range<u16> = 0x3f8..0x400;
/// Interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;

/// Where the guest's bytes go.
pub type ConsoleOutput = Box<dyn Write + Send>;

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Says when the guest has read all its input, so that the console may give it more.
struct InputEvents {
    drained: EventFd,
}

impl SerialEvents for InputEvents {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // The counter would have to be at its limit for this to fail, and then the event is set.
        let _ = self.drained.write(1);
    }
}

/// Collects what one exit writes, so that a string of bytes is one system call.
struct Collected {
    bytes: Vec<u8>,
    output: ConsoleOutput,
}

impl Collected {
    /// Hands the bytes on. A console that is gone must not stop the guest: its bytes are lost, as on a real line.
    fn hand_on(&mut self) {
        let _ = self.output.write_all(&self.bytes).and_then(|()| self.output.flush());
        self.bytes.clear();
    }
}

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is saved of the port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial {
    /// Divisor latch.
    pub divisor: [u8; 2],
    /// IER, IIR, LCR, LSR, MCR, MSR, SCR.
    pub registers: [u8; 7],
    /// Bytes received and not yet read by the guest.
    #[serde(deserialize_with = "at_most::<_, _, FIFO>")]
    pub received: Vec<u8>,
}

/// What a 16550A's receiver holds.
const FIFO: usize = 64;

impl Saved for SavedSerial {
    const KIND: &'static str = "serial-16550a";
    const VERSION: u16 = 1;
}

/// Why the port could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// No eventfd.
    #[error("eventfd: {0}")]
    EventFd(#[from] io::Error),
    /// The saved state holds more than the port can.
    #[error("the saved state of the serial port is not valid: {0}")]
    Saved(String),
}

struct Port {
    serial: Serial<Irq, InputEvents, Collected>,
}

impl PortDevice for Port {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        for byte in data {
            *byte = self.serial.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<VcpuExitReason> {
        for byte in data {
            // Fails when the interrupt cannot be raised or the loopback FIFO is full: a real port loses the byte too.
            let _ = self.serial.write(offset as u8, *byte);
        }
        if !self.serial.writer().bytes.is_empty() {
            self.serial.writer_mut().hand_on();
        }
        None
    }
}

/// COM1, shared between the bus, the console's input and whoever saves it.
#[derive(Clone)]
pub struct Com1 {
    port: Arc<Mutex<Port>>,
}

impl std::fmt::Debug for Com1 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Com1")
    }
}

impl Com1 {
    /// A port in its state after reset, and the event that raises its interrupt line.
    ///
    /// # Errors
    /// When the host has no eventfd left.
    pub fn new(output: ConsoleOutput) -> Result<(Self, EventFd), SerialError> {
        let irq = EventFd::new(libc::EFD_NONBLOCK)?;
        let line = irq.try_clone()?;
        let events = InputEvents { drained: EventFd::new(libc::EFD_NONBLOCK)? };
        let serial = Serial::with_events(Irq(irq), events, Collected { bytes: Vec::new(), output });
        Ok((Self { port: Arc::new(Mutex::new(Port { serial })) }, line))
    }

    /// The port for the bus.
    pub fn device(&self) -> SharedDevice {
        Arc::clone(&self.port) as _
    }

    /// Gives the guest bytes that came in; returns how many it had room for.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut port = self.lock();
        let room = port.serial.fifo_capacity().min(bytes.len());
        port.serial.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }

    /// How many bytes of input the guest has room for.
    pub fn room(&self) -> usize {
        self.lock().serial.fifo_capacity()
    }

    /// An event that is set whenever the guest has read all its input.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn drained(&self) -> io::Result<EventFd> {
        self.lock().serial.events().drained.try_clone()
    }

    /// Reads the state.
    pub fn save(&self) -> SavedSerial {
        let s = self.lock().serial.state();
        SavedSerial {
            divisor: [s.baud_divisor_low, s.baud_divisor_high],
            registers: [
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            received: s.in_buffer,
        }
    }

    /// Writes the state.
    ///
    /// # Errors
    /// When it holds more input than the port has room for.
    pub fn restore(&self, saved: &SavedSerial) -> Result<(), SerialError> {
        let [ier, iir, lcr, lsr, mcr, msr, scratch] = saved.registers;
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: saved.received.clone(),
        };
        let mut port = self.lock();
        let irq = Irq(port.serial.interrupt_evt().0.try_clone()?);
        let events = InputEvents { drained: port.serial.events().drained.try_clone()? };
        let output = std::mem::replace(&mut port.serial.writer_mut().output, Box::new(io::sink()));
        let collected = Collected { bytes: Vec::new(), output };
        port.serial =
            Serial::from_state(&state, irq, events, collected).map_err(|e| SerialError::Saved(format!("{e:?}")))?;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_go_out_and_come_in_and_survive_a_save() {
        let sink = Sink::default();
        let (com1, _irq) = Com1::new(Box::new(sink.clone())).unwrap();
        com1.device().lock().unwrap().write(0, b"hello");
        assert_eq!(&*sink.0.lock().unwrap(), b"hello");

        assert_eq!(com1.receive(b"abc"), 3);
        let saved = com1.save();
        let (other, _irq) = Com1::new(Box::new(sink.clone())).unwrap();
        other.restore(&saved).unwrap();
        assert_eq!(other.save(), saved);
        let mut byte = [0];
        other.device().lock().unwrap().read(0, &mut byte);
        assert_eq!(byte, *b"a");
        other.device().lock().unwrap().write(0, b"!");
        assert_eq!(&*sink.0.lock().unwrap(), b"hello!");
    }

    #[test]
    fn input_never_overflows_the_fifo() {
        let (com1, _irq) = Com1::new(Box::new(io::sink())).unwrap();
        let taken = com1.receive(&[b'x'; 1000]);
        assert!(taken > 0 && taken < 1000);
        assert_eq!(com1.room(), 0);
    }

    #[test]
    fn saved_state_with_too_much_input_is_refused() {
        let (com1, _irq) = Com1::new(Box::new(io::sink())).unwrap();
        let saved = SavedSerial { received: vec![0; 1 << 20], ..com1.save() };
        assert!(com1.restore(&saved).is_err());
    }
}
