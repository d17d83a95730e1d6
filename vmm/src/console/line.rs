//! From a console's input to the device that the guest reads it from, as fast as the guest reads.

use std::io;

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::ConsoleInput;
use crate::devices::host::ConsolePort;
use crate::record::Name;

/// One console's input on its way to its device.
#[derive(Debug)]
pub(crate) struct Line {
    id: Name,
    /// Until it ends.
    input: Option<ConsoleInput>,
    drained: Option<EventFd>,
    /// The event loop's data for input.
    typed: u32,
}

impl Line {
    /// The line to the device `id`, whose input has the event data `typed`.
    pub(crate) fn new(id: Name, input: ConsoleInput, typed: u32) -> Self {
        Self { id, input: Some(input), drained: None, typed }
    }

    /// The device at its end.
    pub(crate) fn id(&self) -> &Name {
        &self.id
    }

    /// Begins to wait for input, and, with the event data `emptied`, for a guest that has read all of it.
    pub(crate) fn attach(&mut self, port: &dyn ConsolePort, emptied: u32, ops: &mut EventOps) {
        let Some(input) = &self.input else { return };
        let drained = port.drained().map_err(|e| e.to_string()).and_then(|drained| {
            let added = ops.add(Events::with_data(&drained, emptied, EventSet::IN));
            added.map(|()| drained).map_err(|e| e.to_string())
        });
        match drained {
            Ok(drained) => self.drained = Some(drained),
            Err(e) => tracing::warn!("long console input will stall: {e}"),
        }
        // Regular files cannot be waited for: a guest whose input is one gets none.
        if ops.add(Events::with_data(input, self.typed, EventSet::IN)).is_err() {
            self.input = None;
        }
    }

    /// The guest has read what it had: there is room for more.
    pub(crate) fn read_on(&self, ops: &mut EventOps) {
        if let Some(drained) = &self.drained {
            let _ = drained.read();
        }
        if let Some(input) = &self.input {
            let _ = ops.modify(Events::with_data(input, self.typed, EventSet::IN));
        }
    }

    /// There is input: hands on what the guest has room for.
    pub(crate) fn read_input(&mut self, port: &dyn ConsolePort, ops: &mut EventOps) {
        let Some(input) = &self.input else { return };
        let mut buffer = [0; 256];
        let room = port.room().min(buffer.len());
        if room == 0 {
            // Until the guest has read what it has.
            let _ = ops.modify(Events::with_data(input, self.typed, EventSet::empty()));
            return;
        }
        match input.read(&mut buffer[..room]) {
            Ok(0) => self.end(ops),
            Ok(n) => {
                port.receive(&buffer[..n]);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => {
                tracing::warn!("console input has ended: {e}");
                self.end(ops);
            }
        }
    }

    fn end(&mut self, ops: &mut EventOps) {
        if let Some(input) = self.input.take() {
            let _ = ops.remove(Events::with_data(&input, self.typed, EventSet::IN));
        }
    }
}
