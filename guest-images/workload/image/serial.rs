//! The first serial port, polled: a queue of output that is sent a few bytes at a time between page operations.

use core::fmt::{self, Write};

use crate::clock::Clock;
use crate::port;

const BASE: u16 = 0x3f8;
const DATA: u16 = BASE;
const INTERRUPTS: u16 = BASE + 1;
const FIFO: u16 = BASE + 2;
const LINE_CONTROL: u16 = BASE + 3;
const MODEM_CONTROL: u16 = BASE + 4;
const STATUS: u16 = BASE + 5;
const STATUS_INPUT: u8 = 0x01;
const STATUS_EMPTY: u8 = 0x20;

/// Bytes that the port takes once it says it is empty.
const CHUNK: usize = 16;
const QUEUE: usize = 8192;

/// Sets up the port: 8 bits, no parity, FIFO on, no interrupts.
pub fn set_up() {
    port::write_u8(INTERRUPTS, 0);
    port::write_u8(LINE_CONTROL, 0x83);
    port::write_u8(DATA, 1);
    port::write_u8(INTERRUPTS, 0);
    port::write_u8(LINE_CONTROL, 0x03);
    port::write_u8(FIFO, 0x01);
    port::write_u8(MODEM_CONTROL, 0x03);
}

/// The output queue. Lines are queued whole or not at all.
pub struct Serial {
    queue: [u8; QUEUE],
    start: usize,
    len: usize,
    retry: u64,
    /// The port had input when it was last looked at.
    pub has_input: bool,
}

impl Serial {
    /// An empty queue.
    pub const fn new() -> Self {
        Self { queue: [0; QUEUE], start: 0, len: 0, retry: 0, has_input: false }
    }

    /// Whether everything was sent.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Queues a line. False if there is no room, as when nobody takes what the port sends.
    pub fn queue(&mut self, line: &dyn fmt::Display) -> bool {
        let before = self.len;
        let queued = writeln!(self, "{line}").is_ok();
        if !queued {
            self.len = before;
        }
        queued
    }

    /// Sends the next few bytes, if there are any and the port takes them. Reads the clock between bytes, as each is
    /// an exit to the host. `patience` is how long to leave a port alone that takes none.
    pub fn pump(&mut self, clock: &mut Clock, patience: u64) {
        let now = clock.read();
        if self.len == 0 || now < self.retry {
            return;
        }
        if self.status() & STATUS_EMPTY == 0 {
            self.retry = now + patience;
            return;
        }
        for _ in 0..CHUNK.min(self.len) {
            clock.read();
            port::write_u8(DATA, self.queue.get(self.start).copied().unwrap_or_default());
            self.start = (self.start + 1) % QUEUE;
            self.len -= 1;
        }
        clock.read();
    }

    /// The next byte of input, if there is one.
    pub fn read(&mut self, clock: &mut Clock) -> Option<u8> {
        self.status();
        clock.read();
        self.has_input.then(|| port::read_u8(DATA))
    }

    fn status(&mut self) -> u8 {
        let status = port::read_u8(STATUS);
        self.has_input = status & STATUS_INPUT != 0;
        status
    }
}

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.len + text.len() > QUEUE {
            return Err(fmt::Error);
        }
        for byte in text.bytes() {
            let end = (self.start + self.len) % QUEUE;
            if let Some(slot) = self.queue.get_mut(end) {
                *slot = byte;
            }
            self.len += 1;
        }
        Ok(())
    }
}

/// Last words: sends a line at once, past any queue, after a line end for what may be half sent.
pub fn say_now(line: &dyn fmt::Display) {
    let _ = write!(Direct, "\n{line}\n");
}

struct Direct;

impl Write for Direct {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // Bounded: the machine is about to end, with or without a listener.
            let _ = (0..10_000).find(|_| port::read_u8(STATUS) & STATUS_EMPTY != 0);
            port::write_u8(DATA, byte);
        }
        Ok(())
    }
}
