//! COM1: a 16550A from vm-superio whose bytes go to a console.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout::{COM1_LINE, COM1_PORTS};
use crate::bounded::at_most;
use crate::devices::host::{ConsoleOutput, ConsolePort, Host};
use crate::devices::{Device, DeviceDescription, DeviceError, RegisterAccess, StopReason};
use crate::record::{Record, RecordError, Saved};

/// What a 16550A's receiver holds here.
const FIFO: usize = 64;

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

impl Saved for SavedSerial {
    const KIND: &'static str = "serial-16550a";
    const VERSION: u16 = 1;
}

type Port = Serial<Irq, InputEvents, Collected>;

/// COM1.
struct Com1 {
    description: DeviceDescription,
    port: Mutex<Port>,
}

impl std::fmt::Debug for Com1 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Com1").field(&self.description.id).finish()
    }
}

/// COM1 in its state after reset.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    host: &mut Host,
) -> Result<Arc<dyn Device>, DeviceError> {
    let refused = |cause| DeviceError::Host { id: description.id.clone(), cause };
    let irq = host.interrupts.line(COM1_LINE).map_err(refused)?;
    let output = host.backends.console(&description.id);
    let com1 = Arc::new(Com1::new(description, irq, output).map_err(refused)?);
    host.ports.consoles.insert(description.id.clone(), Arc::clone(&com1) as _);
    Ok(com1)
}

impl Com1 {
    fn new(description: &DeviceDescription, irq: EventFd, output: ConsoleOutput) -> io::Result<Self> {
        let events = InputEvents { drained: EventFd::new(libc::EFD_NONBLOCK)? };
        let port = Serial::with_events(Irq(irq), events, Collected { bytes: Vec::new(), output });
        Ok(Self { description: description.clone(), port: Mutex::new(port) })
    }

    fn saved(&self) -> SavedSerial {
        let s = self.lock().state();
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

    /// Becomes `state`, on the same lines as before.
    fn set(&self, state: &SerialState) -> Result<(), DeviceError> {
        let id = || self.description.id.clone();
        let mut port = self.lock();
        let host = |cause| DeviceError::Host { id: id(), cause };
        let irq = Irq(port.interrupt_evt().0.try_clone().map_err(host)?);
        let events = InputEvents { drained: port.events().drained.try_clone().map_err(host)? };
        let output = std::mem::replace(&mut port.writer_mut().output, ConsoleOutput::new(io::sink()));
        let collected = Collected { bytes: Vec::new(), output };
        *port = Serial::from_state(state, irq, events, collected).map_err(|e| RecordError::Bytes {
            id: id(),
            kind: self.description.kind.clone(),
            version: self.description.version,
            why: format!("{e:?}"),
        })?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Com1 {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn reset(&self) {
        if let Err(e) = self.set(&SerialState::default()) {
            tracing::warn!("the serial port stays as it was: {e}");
        }
    }

    fn save(&self) -> Result<Record, RecordError> {
        Record::of(self.description.id.as_str(), &self.saved())
    }

    fn restore(&self, saved: &Record) -> Result<(), DeviceError> {
        let SavedSerial { divisor, registers: [ier, iir, lcr, lsr, mcr, msr, scratch], received } = saved.read()?;
        self.set(&SerialState {
            baud_divisor_low: divisor[0],
            baud_divisor_high: divisor[1],
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: received,
        })
    }

    fn ports(self: Arc<Self>) -> Vec<(Range<u64>, Arc<dyn RegisterAccess>)> {
        vec![(COM1_PORTS, self)]
    }
}

impl RegisterAccess for Com1 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.lock();
        for byte in data {
            *byte = port.read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<StopReason> {
        let mut port = self.lock();
        for byte in data {
            // Fails when the interrupt cannot be raised or the loopback FIFO is full: a real port loses the byte too.
            let _ = port.write(offset as u8, *byte);
        }
        if !port.writer().bytes.is_empty() {
            port.writer_mut().hand_on();
        }
        None
    }
}

impl ConsolePort for Com1 {
    fn receive(&self, bytes: &[u8]) -> usize {
        let mut port = self.lock();
        let room = port.fifo_capacity().min(bytes.len());
        port.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }

    fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    fn drained(&self) -> io::Result<EventFd> {
        self.lock().events().drained.try_clone()
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

    fn com1(output: ConsoleOutput) -> Arc<Com1> {
        let kind = SavedSerial::KIND.try_into().unwrap();
        let description = DeviceDescription {
            id: "serial0".try_into().unwrap(),
            kind,
            version: SavedSerial::VERSION,
            features: 0,
            config: Vec::new(),
        };
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Arc::new(Com1::new(&description, irq, output).unwrap())
    }

    #[test]
    fn bytes_go_out_and_come_in_and_survive_a_save() {
        let sink = Sink::default();
        let port = com1(ConsoleOutput::new(sink.clone()));
        port.write(0, b"hello");
        assert_eq!(&*sink.0.lock().unwrap(), b"hello");

        assert_eq!(port.receive(b"abc"), 3);
        let saved = port.save().unwrap();
        let other = com1(ConsoleOutput::new(sink.clone()));
        other.restore(&saved).unwrap();
        assert_eq!(other.save().unwrap(), saved);
        let mut byte = [0];
        other.read(0, &mut byte);
        assert_eq!(byte, *b"a");
        other.write(0, b"!");
        assert_eq!(&*sink.0.lock().unwrap(), b"hello!");
    }

    #[test]
    fn input_never_overflows_the_fifo() {
        let port = com1(ConsoleOutput::new(io::sink()));
        assert_eq!(port.receive(&[b'x'; 1000]), FIFO);
        assert_eq!(port.room(), 0);
    }

    #[test]
    fn saved_state_with_too_much_input_is_refused() {
        let port = com1(ConsoleOutput::new(io::sink()));
        let saved = SavedSerial { received: vec![0; FIFO + 1], ..port.saved() };
        assert!(port.restore(&Record::of("serial0", &saved).unwrap()).is_err());
    }

    #[test]
    fn reset_forgets_what_the_guest_has_set_but_not_where_its_bytes_go() {
        let sink = Sink::default();
        let port = com1(ConsoleOutput::new(sink.clone()));
        let fresh = port.saved();
        port.write(7, &[0x5a]);
        port.receive(b"abc");
        port.reset();
        assert_eq!(port.saved(), fresh);
        port.write(0, b"on");
        assert_eq!(&*sink.0.lock().unwrap(), b"on");
    }
}
