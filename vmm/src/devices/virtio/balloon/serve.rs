//! What the worker does with each queue.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use super::stats::{self, Statistics};
use super::{F_REPORTING, F_STATS_VQ, Registers, ranges};
use crate::devices::virtio::{Activation, Buffers, Chain, DeviceFault, Events, Handler, QueueLock};
use crate::ram::GuestRam;

/// Most bytes of page numbers in one chain: 64 MiB of memory. Linux sends 256 numbers (`VIRTIO_BALLOON_ARRAY_PFNS_MAX`).
const MOST_NUMBERS: u64 = 4 * 16_384;
/// By which the worker learns that statistics are wanted.
const ASKED: u64 = 0;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// What each queue is for: those of features that the driver has not accepted are left out, and the next ones move up (Linux,
/// `vp_find_vqs_msix`).
fn roles(activation: &Activation) -> Vec<Role> {
    let mut roles = vec![Role::Inflate, Role::Deflate];
    roles.extend(activation.has(F_STATS_VQ).then_some(Role::Statistics));
    roles.extend(activation.has(F_REPORTING).then_some(Role::Reporting));
    roles
}

pub(super) struct Serving {
    activation: Activation,
    roles: Vec<Role>,
    registers: Arc<Registers>,
    statistics: Arc<Statistics>,
}

impl Serving {
    pub(super) fn new(activation: &Activation, registers: Arc<Registers>, statistics: Arc<Statistics>) -> Self {
        Self { activation: activation.clone(), roles: roles(activation), registers, statistics }
    }

    /// Gives memory back to the host. What cannot be is no harm to the guest, and said.
    fn give_back(&self, range: &Range<u64>) {
        let bytes = range.end - range.start;
        match self.activation.ram.discard(GuestAddress(range.start), bytes) {
            Ok(discarded) => self.statistics.add_given_back(discarded),
            Err(e) => tracing::debug!("memory that the guest has given back stays: {e}"),
        }
    }

    fn inflate(&self, chain: &Chain, queue: u16) -> Result<(), DeviceFault> {
        for range in ranges::of_page_numbers(page_numbers(&self.activation.ram, &chain.readable, queue)?) {
            self.give_back(&range);
        }
        Ok(())
    }

    fn report(&self, chain: &Chain) {
        // The guest relies on what it has filled free pages with: they have to keep it.
        if self.registers.poison.load(Ordering::SeqCst) == 0 {
            for (address, length) in chain.writable.parts() {
                self.give_back(&(address.0..address.0 + u64::from(*length)));
            }
        }
    }

    fn all(&self, role: Role, queue: &mut QueueLock<'_>, index: u16) -> Result<(), DeviceFault> {
        while let Some(chain) = queue.pop()? {
            match role {
                Role::Inflate => self.inflate(&chain, index)?,
                Role::Deflate => {}
                Role::Reporting => self.report(&chain),
                Role::Statistics => {
                    let read = stats::read(&self.activation.ram, &chain.readable);
                    if let Some(spare) = self.statistics.answer(read, chain.head) {
                        queue.push(spare, 0)?;
                    }
                    continue;
                }
            }
            queue.push(chain.head, 0)?;
        }
        queue.notify()
    }

    /// Gives the statistics' buffer back, which has the driver fill it again.
    fn ask_for_statistics(&self) -> Result<(), DeviceFault> {
        let Some(index) = self.roles.iter().position(|role| *role == Role::Statistics) else { return Ok(()) };
        let Some(head) = self.statistics.take_held() else { return Ok(()) };
        let Activation { ram, notify, queues, .. } = &self.activation;
        let mut queue = queues[index].lock(ram, notify.as_ref());
        queue.push(head, 0)?;
        queue.notify()
    }
}

/// The page numbers in a chain of the inflate queue.
fn page_numbers(ram: &GuestRam, buffers: &Buffers, queue: u16) -> Result<Vec<u32>, DeviceFault> {
    let wrong = |why: String| DeviceFault::Queue { queue, why };
    if buffers.len() > MOST_NUMBERS || !buffers.len().is_multiple_of(4) {
        return Err(wrong(format!("{} bytes of page numbers are not possible", buffers.len())));
    }
    let mut bytes = vec![0; buffers.len() as usize];
    buffers.read(ram, &mut bytes).map_err(|e| wrong(e.to_string()))?;
    let numbers = bytes.chunks_exact(4).filter_map(|bytes| bytes.try_into().ok().map(u32::from_le_bytes));
    Ok(numbers.collect())
}

impl Handler for Serving {
    fn start(&mut self, events: &Events) -> Result<(), DeviceFault> {
        let host = |cause| DeviceFault::Host { what: "epoll_ctl", cause };
        events.add(self.statistics.asked(), EventSet::IN, ASKED).map_err(host)
    }

    fn queue(&mut self, index: u16, _: &Events) -> Result<(), DeviceFault> {
        let Some(role) = self.roles.get(usize::from(index)) else { return Ok(()) };
        let Activation { ram, notify, queues, .. } = &self.activation;
        let mut queue = queues[usize::from(index)].lock(ram, notify.as_ref());
        if !queue.is_ready() {
            return Ok(());
        }
        self.all(*role, &mut queue, index)
    }

    fn event(&mut self, _: u64, _: EventSet, _: &Events) -> Result<(), DeviceFault> {
        let _ = self.statistics.asked().read();
        self.ask_for_statistics()
    }
}
