//! What the worker does: packets of the guest's, packets for it, and streams of the host's programs.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::epoll::EventSet;

use super::connection::{BUFFER, Connection, Fate};
use super::packet::{HEADER, Header, MOST_DATA, Op, Ports};
use super::socket::{Greeting, VsockSocket, greeting};
use crate::devices::virtio::{Activation, Chain, DeviceFault, Events, Handler, QueueLock};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
/// The token of the socket where programs connect; those of streams are above.
const LISTENER: u64 = 0;
/// Most connections at a time: a descriptor each.
const MOST_CONNECTIONS: usize = 256;
/// Most programs that have connected and not said yet what they want; the oldest gives way.
const MOST_GREETINGS: usize = 16;
/// Most connections that are over and of which the guest has to be told.
const MOST_RESETS: usize = 256;
/// Most packets of the guest's at once, after which others have their turn.
const BATCH: usize = 64;
/// Where the numbers of the host's ports begin for connections that its programs ask for.
const FIRST_PORT: u32 = 1 << 30;
/// All connections are over (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

pub(super) struct Serving {
    activation: Activation,
    guest_cid: u64,
    socket: Arc<VsockSocket>,
    /// The guest has come from elsewhere, and its connections have not.
    is_reset_due: Arc<AtomicBool>,
    connections: BTreeMap<Ports, Connection>,
    /// By which token each stream is known.
    tokens: BTreeMap<u64, Ports>,
    greetings: VecDeque<(u64, UnixStream)>,
    resets: VecDeque<Ports>,
    /// Those that have something for the guest.
    ready: VecDeque<Ports>,
    next_token: u64,
    next_port: u32,
    has_buffers: bool,
    chain: Chain,
    /// A header and what is behind it.
    packet: Box<[u8]>,
}

impl Serving {
    pub(super) fn new(
        activation: &Activation,
        guest_cid: u64,
        socket: &Arc<VsockSocket>,
        is_reset_due: &Arc<AtomicBool>,
    ) -> Self {
        Self {
            activation: activation.clone(),
            guest_cid,
            socket: Arc::clone(socket),
            is_reset_due: Arc::clone(is_reset_due),
            connections: BTreeMap::new(),
            tokens: BTreeMap::new(),
            greetings: VecDeque::new(),
            resets: VecDeque::new(),
            ready: VecDeque::new(),
            next_token: LISTENER + 1,
            next_port: FIRST_PORT,
            has_buffers: true,
            chain: Chain::default(),
            packet: vec![0; HEADER + MOST_DATA].into(),
        }
    }

    /// Packets of the guest's, then those for it.
    fn work(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let activation = self.activation.clone();
        self.transmit(&mut lock(&activation, TRANSMIT), events)?;
        self.receive(&mut lock(&activation, RECEIVE), events)?;
        self.tell_of_reset(&mut lock(&activation, EVENT))?;
        self.wait_for_streams(events)
    }

    fn transmit(&mut self, queue: &mut QueueLock<'_>, events: &Events) -> Result<(), DeviceFault> {
        if !queue.is_ready() {
            return Ok(());
        }
        for taken in 0.. {
            // The guest is told of what is over before it is heard again.
            if self.resets.len() >= MOST_RESETS {
                break;
            }
            if taken == BATCH {
                // Fails only where it is set already.
                let _ = self.activation.queues[usize::from(TRANSMIT)].kick().write(1);
                break;
            }
            if !queue.pop_into(&mut self.chain)? {
                break;
            }
            self.hear(events).map_err(|e| queue.fault(e.to_string()))?;
            queue.push(self.chain.head, 0)?;
        }
        queue.notify()
    }

    /// Hears one packet. What is not for this host is dropped, as networks do.
    fn hear(&mut self, events: &Events) -> Result<(), vm_memory::GuestMemoryError> {
        let ram = Arc::clone(&self.activation.ram);
        let Some(header) = Header::read(&ram, &self.chain.readable, self.guest_cid)? else { return Ok(()) };
        let behind = (self.chain.readable.len() as usize - HEADER).min(MOST_DATA);
        let length = header.length as usize;
        let Some(connection) = self.connections.get_mut(&header.ports) else {
            match header.op {
                Some(Op::Request) => self.connect(&header, events),
                Some(Op::Reset) => {}
                _ => self.resets.push_back(header.ports),
            }
            return Ok(());
        };
        let has_data = header.op == Some(Op::Data);
        let fate = if has_data && length > behind {
            Fate::Reset
        } else {
            let end = if has_data { HEADER + length } else { HEADER };
            self.chain.readable.read(&ram, &mut self.packet[..end])?;
            connection.hear(&header, &self.packet[HEADER..end])
        };
        self.follow(header.ports, fate, events);
        Ok(())
    }

    /// The guest asks for a port of the host's.
    fn connect(&mut self, header: &Header, events: &Events) {
        let stream = self.socket.connect(header.ports.host);
        match stream {
            Ok(stream) if self.connections.len() < MOST_CONNECTIONS => {
                self.add(Connection::of_guest(header, stream), events);
            }
            _ => self.resets.push_back(header.ports),
        }
    }

    /// A connection begins.
    fn add(&mut self, mut connection: Connection, events: &Events) {
        let (ports, token) = (connection.ports, self.next_token);
        self.next_token += 1;
        if events.add(connection.stream(), EventSet::empty(), token).is_err() {
            self.resets.push_back(ports);
            return;
        }
        connection.interest = Some((token, EventSet::empty()));
        self.tokens.insert(token, ports);
        self.connections.insert(ports, connection);
        self.list(ports);
    }

    fn list(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.get_mut(&ports)
            && connection.has_work()
            && !std::mem::replace(&mut connection.is_listed, true)
        {
            self.ready.push_back(ports);
        }
    }

    /// What has become of a connection.
    fn follow(&mut self, ports: Ports, fate: Fate, events: &Events) {
        if fate == Fate::Stays {
            return self.list(ports);
        }
        let Some(connection) = self.connections.remove(&ports) else { return };
        if let Some((token, _)) = connection.interest {
            self.tokens.remove(&token);
            // It goes with the stream in any case.
            let _ = events.remove(connection.stream());
        }
        if fate == Fate::Reset {
            self.resets.push_back(ports);
        }
    }

    /// Fills the guest's buffers for as long as there is something for it.
    fn receive(&mut self, queue: &mut QueueLock<'_>, events: &Events) -> Result<(), DeviceFault> {
        if !queue.is_ready() {
            return Ok(());
        }
        self.has_buffers = true;
        while !(self.resets.is_empty() && self.ready.is_empty()) {
            if !queue.pop_into(&mut self.chain)? {
                self.has_buffers = false;
                break;
            }
            let room = self.chain.writable.len() as usize;
            if room < HEADER {
                return Err(queue.fault(format!("a buffer of {room} bytes has no room for a header")));
            }
            let Some(bytes) = self.next_packet(room - HEADER, events) else {
                queue.undo_pop();
                break;
            };
            let written = self.chain.writable.write(&self.activation.ram, &self.packet[..bytes]);
            let written = written.map_err(|e| queue.fault(e.to_string()))?;
            queue.push(self.chain.head, written as u32)?;
        }
        queue.notify()
    }

    /// Makes the next packet for the guest; the number of its bytes.
    fn next_packet(&mut self, room: usize, events: &Events) -> Option<usize> {
        loop {
            if let Some(ports) = self.resets.pop_front() {
                let header = Header { ports, length: 0, op: Some(Op::Reset), flags: 0, buffer: BUFFER, forwarded: 0 };
                self.packet[..HEADER].copy_from_slice(&header.bytes(self.guest_cid));
                return Some(HEADER);
            }
            let ports = self.ready.pop_front()?;
            let Some(connection) = self.connections.get_mut(&ports) else { continue };
            connection.is_listed = false;
            let (head, data) = self.packet.split_at_mut(HEADER);
            match connection.next(room, data) {
                Ok(Some((header, bytes))) => {
                    head.copy_from_slice(&header.bytes(self.guest_cid));
                    self.list(ports);
                    return Some(HEADER + bytes);
                }
                // It has nothing after all, or no room: it is heard of again.
                Ok(None) => {}
                Err(fate) => self.follow(ports, fate, events),
            }
        }
    }

    fn tell_of_reset(&mut self, queue: &mut QueueLock<'_>) -> Result<(), DeviceFault> {
        if !queue.is_ready() || !self.is_reset_due.load(Ordering::SeqCst) || !queue.pop_into(&mut self.chain)? {
            return Ok(());
        }
        let written = self.chain.writable.write(&self.activation.ram, &TRANSPORT_RESET);
        let written = written.map_err(|e| queue.fault(e.to_string()))?;
        queue.push(self.chain.head, written as u32)?;
        self.is_reset_due.store(false, Ordering::SeqCst);
        queue.notify()
    }

    fn wait_for_streams(&mut self, events: &Events) -> Result<(), DeviceFault> {
        for connection in self.connections.values_mut() {
            let wanted = connection.wanted(self.has_buffers);
            let changed = connection.interest.filter(|(_, interest)| *interest != wanted);
            let Some((token, _)) = changed else { continue };
            let modified = events.modify(connection.stream(), wanted, token);
            modified.map_err(|cause| DeviceFault::Host { what: "epoll_ctl", cause })?;
            connection.interest = Some((token, wanted));
        }
        Ok(())
    }

    /// Programs that have connected.
    fn accept(&mut self, events: &Events) {
        for _ in 0..MOST_GREETINGS {
            let Ok((stream, _)) = self.socket.listener().accept() else { break };
            let token = self.next_token;
            self.next_token += 1;
            if stream.set_nonblocking(true).is_err() || events.add(&stream, EventSet::IN, token).is_err() {
                continue;
            }
            if self.greetings.len() == MOST_GREETINGS {
                self.greetings.pop_front();
            }
            self.greetings.push_back((token, stream));
        }
    }

    /// A program says what it wants.
    fn greet(&mut self, token: u64, events: &Events) {
        let Some(at) = self.greetings.iter().position(|(other, _)| *other == token) else { return };
        let said = greeting(&self.greetings[at].1);
        if said == Greeting::Partly {
            return;
        }
        let Some((_, stream)) = self.greetings.remove(at) else { return };
        let _ = events.remove(&stream);
        if let Greeting::Connect(guest) = said
            && self.connections.len() < MOST_CONNECTIONS
        {
            let ports = Ports { host: self.free_port(guest), guest };
            self.add(Connection::of_host(ports, stream), events);
        }
    }

    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn stream_event(&mut self, token: u64, set: EventSet, events: &Events) {
        let Some(ports) = self.tokens.get(&token).copied() else { return self.greet(token, events) };
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        connection.is_readable |= set.contains(EventSet::IN);
        let mut fate = if set.contains(EventSet::OUT) { connection.flush() } else { Fate::Stays };
        if fate == Fate::Stays && set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            fate = connection.hang_up();
            // It would be told of again and again.
            if connection.interest.take().is_some() {
                let _ = events.remove(connection.stream());
                self.tokens.remove(&token);
            }
        }
        self.follow(ports, fate, events);
    }
}

fn lock(activation: &Activation, index: u16) -> QueueLock<'_> {
    let Activation { ram, notify, queues, .. } = activation;
    queues[usize::from(index)].lock(ram, notify.as_ref())
}

impl Handler for Serving {
    fn start(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let host = |cause| DeviceFault::Host { what: "epoll_ctl", cause };
        events.add(self.socket.listener(), EventSet::IN, LISTENER).map_err(host)
    }

    fn queue(&mut self, _: u16, events: &Events) -> Result<(), DeviceFault> {
        self.work(events)
    }

    fn event(&mut self, token: u64, set: EventSet, events: &Events) -> Result<(), DeviceFault> {
        if token == LISTENER {
            self.accept(events);
        } else {
            self.stream_event(token, set, events);
        }
        self.work(events)
    }
}
