//! What the worker does: input into the guest's buffers, the guest's bytes out.

use std::io::Write;
use std::sync::Arc;

use vm_memory::GuestMemoryError;
use vmm_sys_util::epoll::EventSet;

use super::Input;
use crate::devices::host::ConsoleOutput;
use crate::devices::virtio::{Activation, Buffers, DeviceFault, Events, Handler};
use crate::ram::GuestRam;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// By which the worker learns that there is input.
const ARRIVED: u64 = 0;
/// How many bytes are copied out of the guest at once.
const PIECE: usize = 4096;

pub(super) struct Serving {
    activation: Activation,
    input: Arc<Input>,
    output: ConsoleOutput,
}

impl Serving {
    pub(super) fn new(activation: &Activation, input: Arc<Input>, output: ConsoleOutput) -> Self {
        Self { activation: activation.clone(), input, output }
    }

    fn receive(&self) -> Result<(), DeviceFault> {
        let Activation { ram, notify, queues, .. } = &self.activation;
        let mut queue = queues[usize::from(RECEIVE)].lock(ram, notify.as_ref());
        if !queue.is_ready() {
            return Ok(());
        }
        while !self.input.lock().is_empty() {
            let Some(chain) = queue.pop()? else { break };
            let bytes = self.input.take(chain.writable.len());
            let written = chain.writable.write(ram, &bytes).map_err(wrong(RECEIVE))?;
            queue.push(chain.head, written as u32)?;
        }
        queue.notify()
    }

    fn transmit(&mut self) -> Result<(), DeviceFault> {
        let Activation { ram, notify, queues, .. } = &self.activation;
        let mut queue = queues[usize::from(TRANSMIT)].lock(ram, notify.as_ref());
        if !queue.is_ready() {
            return Ok(());
        }
        while let Some(chain) = queue.pop()? {
            Self::write_out(&mut self.output, ram, chain.readable).map_err(wrong(TRANSMIT))?;
            queue.push(chain.head, 0)?;
        }
        queue.notify()
    }

    /// A console that is gone must not stop the guest: its bytes are lost, as on a line.
    fn write_out(output: &mut ConsoleOutput, ram: &GuestRam, mut buffers: Buffers) -> Result<(), GuestMemoryError> {
        let mut piece = [0; PIECE];
        while !buffers.is_empty() {
            let read = buffers.split_to(PIECE as u64).read(ram, &mut piece)?;
            let _ = output.write_all(&piece[..read]);
        }
        let _ = output.flush();
        Ok(())
    }
}

fn wrong(queue: u16) -> impl FnOnce(GuestMemoryError) -> DeviceFault {
    move |e| DeviceFault::Queue { queue, why: e.to_string() }
}

impl Handler for Serving {
    fn start(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let host = |cause| DeviceFault::Host { what: "epoll_ctl", cause };
        events.add(&self.input.arrived, EventSet::IN, ARRIVED).map_err(host)
    }

    fn queue(&mut self, index: u16, _: &Events) -> Result<(), DeviceFault> {
        if index == TRANSMIT { self.transmit() } else { self.receive() }
    }

    fn event(&mut self, _: u64, _: EventSet, _: &Events) -> Result<(), DeviceFault> {
        let _ = self.input.arrived.read();
        self.receive()
    }
}
