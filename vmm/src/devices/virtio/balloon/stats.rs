//! What the guest says of its memory (VIRTIO 1.2, 5.5.6.3). The driver fills a buffer and the device keeps it; whoever wants to
//! know has it given back, and the driver fills it again.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::Buffers;
use crate::ram::GuestRam;

/// Bytes of one value: a tag of 16 bits, a number of 64.
const VALUE: usize = 10;
/// Most values that are looked at; the specification has ten.
const MOST: usize = 64;

/// What a guest says of its memory, and nothing that it leaves out. It may say anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BalloonStats {
    /// Memory that has been swapped in, bytes.
    pub swap_in: Option<u64>,
    /// Memory that has been swapped out to disk, bytes.
    pub swap_out: Option<u64>,
    /// Major page faults.
    pub major_faults: Option<u64>,
    /// Minor page faults.
    pub minor_faults: Option<u64>,
    /// Memory that is not used for anything, bytes.
    pub free_memory: Option<u64>,
    /// Memory that there is, bytes.
    pub total_memory: Option<u64>,
    /// Memory that can be used without pushing the guest into swap, bytes.
    pub available_memory: Option<u64>,
    /// Memory in caches that can be had quickly, bytes.
    pub disk_caches: Option<u64>,
    /// Successful allocations of huge pages.
    pub hugetlb_allocations: Option<u64>,
    /// Failed allocations of huge pages.
    pub hugetlb_failures: Option<u64>,
}

impl BalloonStats {
    fn of_bytes(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        for value in bytes.chunks_exact(VALUE) {
            let (tag, number) = value.split_at(2);
            let (Ok(tag), Ok(number)) = (tag.try_into(), number.try_into()) else { continue };
            let place = match u16::from_le_bytes(tag) {
                0 => &mut stats.swap_in,
                1 => &mut stats.swap_out,
                2 => &mut stats.major_faults,
                3 => &mut stats.minor_faults,
                4 => &mut stats.free_memory,
                5 => &mut stats.total_memory,
                6 => &mut stats.available_memory,
                7 => &mut stats.disk_caches,
                8 => &mut stats.hugetlb_allocations,
                9 => &mut stats.hugetlb_failures,
                _ => continue,
            };
            *place = Some(u64::from_le_bytes(number));
        }
        stats
    }
}

/// Reads the statistics in a chain; what is behind the most that there can be is not looked at.
pub(super) fn read(ram: &GuestRam, buffers: &Buffers) -> BalloonStats {
    let mut bytes = vec![0; buffers.len().min((MOST * VALUE) as u64) as usize];
    let read = buffers.read(ram, &mut bytes).unwrap_or(0);
    BalloonStats::of_bytes(&bytes[..read])
}

#[derive(Debug, Default)]
struct State {
    /// The buffer that the driver has filled and not got back.
    held: Option<u16>,
    last: Option<BalloonStats>,
    /// How often the driver has filled it.
    answers: u64,
    works: bool,
}

/// Where the worker leaves statistics and others ask for them.
#[derive(Debug)]
pub(super) struct Statistics {
    state: Mutex<State>,
    changed: Condvar,
    asked: EventFd,
    given_back: AtomicU64,
}

impl Statistics {
    pub(super) fn new() -> io::Result<Self> {
        let asked = EventFd::new(libc::EFD_NONBLOCK)?;
        Ok(Self { state: Mutex::default(), changed: Condvar::new(), asked, given_back: AtomicU64::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Set when somebody wants to know.
    pub(super) fn asked(&self) -> &EventFd {
        &self.asked
    }

    /// A driver begins.
    pub(super) fn begin(&self) {
        self.lock().works = true;
        self.given_back.store(0, Ordering::Relaxed);
    }

    /// The driver is gone, and its buffer with it.
    pub(super) fn end(&self) {
        *self.lock() = State::default();
        self.changed.notify_all();
    }

    /// The driver has filled the buffer `head`. Of two, one is given back: a driver has only one.
    pub(super) fn answer(&self, stats: BalloonStats, head: u16) -> Option<u16> {
        let mut state = self.lock();
        (state.last, state.answers) = (Some(stats), state.answers + 1);
        self.changed.notify_all();
        state.held.replace(head)
    }

    /// The buffer that is held, which is to be given back.
    pub(super) fn take_held(&self) -> Option<u16> {
        self.lock().held.take()
    }

    pub(super) fn held(&self) -> Option<u16> {
        self.lock().held
    }

    pub(super) fn hold(&self, head: Option<u16>) {
        self.lock().held = head;
    }

    /// Has the driver asked, and waits for its answer.
    pub(super) fn ask(&self, limit: Duration) -> Option<BalloonStats> {
        let state = self.lock();
        if !state.works || state.held.is_none() {
            return None;
        }
        let before = state.answers;
        // Fails only where the event is set already.
        let _ = self.asked.write(1);
        let waiting = |state: &mut State| state.works && state.answers == before;
        let waited = self.changed.wait_timeout_while(state, limit, waiting);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.answers == before { None } else { state.last }
    }

    pub(super) fn add_given_back(&self, bytes: u64) {
        self.given_back.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_read_by_tags_and_nothing_else_is() {
        let value = |tag: u16, number: u64| [&tag.to_le_bytes()[..], &number.to_le_bytes()].concat();
        let bytes = [value(5, 1 << 30), value(99, 1), value(4, 7), vec![0; 9]].concat();
        let stats = BalloonStats::of_bytes(&bytes);
        assert_eq!(stats, BalloonStats { free_memory: Some(7), total_memory: Some(1 << 30), ..Default::default() });
    }
}
