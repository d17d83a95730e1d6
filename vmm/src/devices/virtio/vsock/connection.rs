//! One connection between a program of the host and one in the guest, with the credit of both ways (VIRTIO 1.2, 5.10.6.3).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::packet::{Header, Op, Ports, RECEIVES_NO_MORE, SENDS_NO_MORE};

/// Most bytes that the guest has sent and the host's program has not taken yet.
pub(super) const BUFFER: u32 = 64 << 10;

/// What is still to be told to the guest.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    stream: UnixStream,
    /// The guest has answered, or asked.
    is_established: bool,
    /// The host's program asked for it, and waits for the answer.
    awaits_ok: bool,
    /// From the guest, for the host's program.
    outgoing: VecDeque<u8>,
    /// Taken out of there so far, and what of it the guest knows.
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    /// What the guest has room for, what it has taken, and what it was sent.
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// The other end of the stream is closed both ways: what is there can be read, and nothing else.
    is_hung_up: bool,
    /// What the guest has said of itself.
    guest_flags: u32,
    /// The host's program sends no more.
    is_at_end: bool,
    /// There may be something to read.
    pub(super) is_readable: bool,
    /// It is in the list of those that have something for the guest.
    pub(super) is_listed: bool,
    /// By which token the stream is known, and what is waited for there, if anything is.
    pub(super) interest: Option<(u64, EventSet)>,
    owed: Owed,
}

/// How a connection ends with its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Stays,
    /// It is over; the guest is told.
    Reset,
    /// It is over, and the guest knows.
    Gone,
}

impl Connection {
    fn new(ports: Ports, stream: UnixStream) -> Self {
        Self {
            ports,
            stream,
            is_established: false,
            awaits_ok: false,
            outgoing: VecDeque::new(),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            sent: Wrapping(0),
            is_hung_up: false,
            guest_flags: 0,
            is_at_end: false,
            is_readable: false,
            is_listed: false,
            interest: None,
            owed: Owed::default(),
        }
    }

    /// One that the guest asks for; the stream leads to the host's program.
    pub(super) fn of_guest(header: &Header, stream: UnixStream) -> Self {
        let mut connection = Self::new(header.ports, stream);
        connection.hear_of_credit(header);
        connection.is_established = true;
        connection.owed.response = true;
        connection
    }

    /// One that a program of the host asks for.
    pub(super) fn of_host(ports: Ports, stream: UnixStream) -> Self {
        let mut connection = Self::new(ports, stream);
        connection.awaits_ok = true;
        connection.owed.request = true;
        connection
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn hear_of_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = Wrapping(header.forwarded);
    }

    /// How many bytes the guest has room for. A guest that says it has taken what it was never sent gets nothing.
    fn credit(&self) -> usize {
        let on_the_way = (self.sent - self.guest_forwarded).0;
        self.guest_buffer.saturating_sub(on_the_way) as usize
    }

    /// Whether there may be data of the host's program for the guest.
    fn may_read(&self) -> bool {
        self.is_established && !self.is_at_end && self.guest_flags & RECEIVES_NO_MORE == 0 && self.credit() > 0
    }

    /// Whether it has something for the guest.
    pub(super) fn has_work(&self) -> bool {
        let Owed { request, response, credit_update, credit_request } = self.owed;
        request || response || credit_update || credit_request || (self.is_readable && self.may_read())
    }

    /// The program has closed both ways; whether all of it has been read.
    pub(super) fn hang_up(&mut self) -> Fate {
        (self.is_hung_up, self.is_readable) = (true, true);
        if self.is_at_end { Fate::Reset } else { Fate::Stays }
    }

    /// What is to be waited for at the stream: `is_reading` if the guest has buffers.
    pub(super) fn wanted(&self, is_reading: bool) -> EventSet {
        let mut wanted = EventSet::empty();
        if is_reading && self.may_read() && !self.is_readable {
            wanted |= EventSet::IN;
        }
        if !self.outgoing.is_empty() {
            wanted |= EventSet::OUT;
        }
        wanted
    }

    /// Hears a packet of the guest's, of which `data` are the bytes behind the header.
    pub(super) fn hear(&mut self, header: &Header, data: &[u8]) -> Fate {
        self.hear_of_credit(header);
        match header.op {
            Some(Op::Response) if self.awaits_ok => self.answer(),
            Some(Op::Data) if self.is_established => self.take(data),
            Some(Op::CreditUpdate) if self.is_established => Fate::Stays,
            Some(Op::CreditRequest) if self.is_established => {
                self.owed.credit_update = true;
                Fate::Stays
            }
            Some(Op::Shutdown) if self.is_established => {
                self.guest_flags |= header.flags & (RECEIVES_NO_MORE | SENDS_NO_MORE);
                self.flush()
            }
            Some(Op::Reset) => {
                // What it had sent before still belongs to the program.
                let _ = self.flush();
                Fate::Gone
            }
            _ => Fate::Reset,
        }
    }

    fn answer(&mut self) -> Fate {
        self.is_established = true;
        self.awaits_ok = false;
        self.outgoing.extend(format!("OK {}\n", self.ports.host).into_bytes());
        // Not the guest's bytes: it hears of as many less.
        self.forwarded -= self.outgoing.len() as u32;
        self.forwarded_told = self.forwarded;
        self.flush()
    }

    fn take(&mut self, data: &[u8]) -> Fate {
        let is_allowed =
            self.guest_flags & SENDS_NO_MORE == 0 && self.outgoing.len() + data.len() <= BUFFER as usize + 32;
        if !is_allowed {
            return Fate::Reset;
        }
        self.outgoing.extend(data);
        self.flush()
    }

    /// Gives the host's program what it takes.
    pub(super) fn flush(&mut self) -> Fate {
        while !self.outgoing.is_empty() {
            match self.stream.write(self.outgoing.as_slices().0) {
                Ok(count) => {
                    self.outgoing.drain(..count);
                    self.forwarded += count as u32;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Fate::Reset,
            }
        }
        // Not for each byte.
        if (self.forwarded - self.forwarded_told).0 >= BUFFER / 4 {
            self.owed.credit_update = true;
        }
        if !self.outgoing.is_empty() || self.guest_flags & SENDS_NO_MORE == 0 {
            return Fate::Stays;
        }
        if self.guest_flags & RECEIVES_NO_MORE != 0 {
            return Fate::Reset;
        }
        let _ = self.stream.shutdown(Shutdown::Write);
        Fate::Stays
    }

    /// The next packet for the guest, whose data are written to `data`, at most `room` bytes.
    pub(super) fn next(&mut self, room: usize, data: &mut [u8]) -> Result<Option<(Header, usize)>, Fate> {
        if let Some(op) = self.next_owed() {
            return Ok(Some((self.header(op, 0), 0)));
        }
        if !(self.is_readable && self.may_read()) {
            return Ok(None);
        }
        let most = room.min(self.credit()).min(data.len());
        if most == 0 {
            return Ok(None);
        }
        match self.stream.read(&mut data[..most]) {
            Ok(0) if self.is_hung_up => Err(Fate::Reset),
            Ok(0) => {
                self.is_at_end = true;
                Ok(Some((self.header(Op::Shutdown, 0), 0)))
            }
            Ok(count) => {
                self.sent += count as u32;
                self.owed.credit_request |= self.credit() == 0;
                Ok(Some((self.header(Op::Data, count as u32), count)))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.is_readable = false;
                Ok(None)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(_) => Err(Fate::Reset),
        }
    }

    fn next_owed(&mut self) -> Option<Op> {
        let Owed { request, response, credit_update, credit_request } = &mut self.owed;
        let owed = [
            (request, Op::Request),
            (response, Op::Response),
            (credit_update, Op::CreditUpdate),
            (credit_request, Op::CreditRequest),
        ];
        owed.into_iter().find(|(is_owed, _)| **is_owed).map(|(is_owed, op)| {
            *is_owed = false;
            op
        })
    }

    fn header(&mut self, op: Op, length: u32) -> Header {
        self.forwarded_told = self.forwarded;
        if op != Op::CreditRequest && op != Op::Request {
            self.owed.credit_update = false;
        }
        let flags = if op == Op::Shutdown { SENDS_NO_MORE } else { 0 };
        Header { ports: self.ports, length, op: Some(op), flags, buffer: BUFFER, forwarded: self.forwarded.0 }
    }
}
