//! The balloon (Virtio 1.2, 5.5): pages lent to the host, and free page reporting, by which it is told of pages whose
//! contents nobody needs.

use super::queue::{Descriptor, Queue, Rings};
use super::transport::{DeviceError, EVENT_INDEX, Kind, Transport};
use super::{Patience, Setting};
use crate::arena::{self, Arena};
use crate::bars::Window;
use crate::device_report::{Balloon as Answer, Free};
use crate::extents::Extents;
use crate::pages;
use crate::traps::Signal;

const STATISTICS: u64 = 1 << 1;
const HINTING: u64 = 1 << 3;
const REPORTING: u64 = 1 << 5;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Where in the configuration the host's wish and the guest's answer are.
const WANTED: u64 = 0;
const ACTUAL: u64 = 4;

const PAGE: u64 = 4096;
/// Page numbers in a request.
const NUMBERS: u64 = PAGE / 4;
/// Pieces of free memory are reported in this size, so many at a time, as Linux does.
const PIECE: u64 = 2 << 20;
const PIECES: usize = 32;
const PATIENCE_US: u64 = 10_000_000;

/// The balloon, and the memory that may go into it.
pub struct Balloon {
    transport: Transport,
    inflate: Queue,
    deflate: Queue,
    reporting: Option<Queue>,
    numbers: u64,
    setting: Setting,
    free: Extents,
    /// Pages of it that are in the balloon, from the first on.
    inside: u64,
}

impl Balloon {
    /// The first balloon, with this memory.
    pub fn find(setting: Setting, free: Extents, window: &mut Window, arena: &mut Arena) -> Result<Self, DeviceError> {
        let mut transport = Transport::find(Kind::Balloon, setting.interrupts, window)?;
        transport.negotiate(STATISTICS | HINTING | REPORTING | EVENT_INDEX)?;
        let mut queue = |index| {
            let rings = Rings::new(transport.queue_size(index, 128)?, arena);
            Ok(transport.queue(index, rings, Signal::Balloon))
        };
        let (inflate, deflate) = (queue(INFLATE)?, queue(DEFLATE)?);
        // Queues are numbered without those that are not there. All that is offered was agreed on, so that it is the
        // same whichever side counts.
        let before = [STATISTICS, HINTING].into_iter().filter(|feature| transport.has(*feature)).count() as u16;
        let reporting = if transport.has(REPORTING) { Some(queue(2 + before)?) } else { None };
        transport.start();
        let numbers = arena.zeroed(PAGE);
        Ok(Self { transport, inflate, deflate, reporting, numbers, setting, free, inside: 0 })
    }

    /// Whether free pages can be reported.
    pub fn reports(&self) -> bool {
        self.reporting.is_some()
    }

    /// Writes all pages.
    pub fn fill(&mut self, patience: &mut Patience<'_>) -> Free {
        let seed = self.setting.seed;
        self.each(patience, |page, answer| {
            pages::fill(page, seed, 0);
            answer.kept += 1;
        })
    }

    /// Reads all pages: a page that the host has taken is zeros when it comes back, and all others are as filled.
    pub fn check(&mut self, patience: &mut Patience<'_>) -> Free {
        let seed = self.setting.seed;
        self.each(patience, |page, answer| match pages::compare(page, seed, 0) {
            Ok(()) => answer.kept += 1,
            Err(_) if is_zero(page) => answer.zeros += 1,
            Err(_) => answer.errors += 1,
        })
    }

    /// Visits all pages that are not inside.
    fn each(&mut self, patience: &mut Patience<'_>, mut visit: impl FnMut(u64, &mut Free)) -> Free {
        let start = patience.clock.read();
        let all = self.inside..self.free.pages();
        let mut answer = Free { pages: all.end - all.start, zeros: 0, kept: 0, errors: 0, took_us: 0 };
        for page in all.filter_map(|index| self.free.page(index)) {
            visit(page, &mut answer);
            let now = patience.clock.read();
            patience.console.tell(now, patience.clock);
        }
        answer.took_us = self.since(start, patience);
        answer
    }

    /// Reports all pages as free. `pages` of the answer says how many of them the host has heard of.
    pub fn report(&mut self, patience: &mut Patience<'_>) -> Free {
        let start = patience.clock.read();
        let mut answer = Free { pages: 0, zeros: 0, kept: 0, errors: 0, took_us: 0 };
        let Some(queue) = &mut self.reporting else { return answer };
        let pieces = self.free.iter().flat_map(|extent| {
            let pieces = (extent.start..extent.end()).step_by(PIECE as usize);
            pieces.map(|start| Descriptor::writable(start, (extent.end() - start).min(PIECE) as u32))
        });
        let (mut parts, mut count) = ([Descriptor::default(); PIECES], 0);
        let mut pieces = pieces.peekable();
        while let Some(piece) = pieces.next() {
            parts[count] = piece;
            count += 1;
            if count < PIECES && pieces.peek().is_some() {
                continue;
            }
            let told = &parts[..count];
            if !ask(queue, told, self.setting, patience) {
                break;
            }
            answer.pages += told.iter().map(|part| u64::from(part.length) / PAGE).sum::<u64>();
            count = 0;
        }
        answer.took_us = self.since(start, patience);
        answer
    }

    /// Inflates or deflates until so many pages are inside, or all there are.
    pub fn set(&mut self, pages: u64, patience: &mut Patience<'_>) -> Answer {
        let start = patience.clock.read();
        let wanted = pages.min(self.free.pages());
        while self.inside != wanted {
            let is_inflating = self.inside < wanted;
            let (from, to) = if is_inflating {
                (self.inside, wanted.min(self.inside + NUMBERS))
            } else {
                (wanted.max(self.inside.saturating_sub(NUMBERS)), self.inside)
            };
            let numbers = arena::bytes(self.numbers, PAGE as usize).chunks_exact_mut(4);
            for (slot, index) in numbers.zip(from..to) {
                let number = self.free.page(index).unwrap_or_default() / PAGE;
                slot.copy_from_slice(&(number as u32).to_le_bytes());
            }
            let queue = if is_inflating { &mut self.inflate } else { &mut self.deflate };
            if !ask(queue, &[Descriptor::readable(self.numbers, ((to - from) * 4) as u32)], self.setting, patience) {
                break;
            }
            self.inside = if is_inflating { to } else { from };
        }
        self.transport.set_config(ACTUAL, self.inside as u32);
        let wanted = u64::from(self.transport.config(WANTED));
        Answer { pages: self.inside, wanted, took_us: self.since(start, patience) }
    }

    fn since(&self, start: u64, patience: &mut Patience<'_>) -> u64 {
        self.setting.frequency.us(patience.clock.read().saturating_sub(start))
    }
}

/// Hands over a request and waits until the device is done with it.
fn ask(queue: &mut Queue, parts: &[Descriptor], setting: Setting, patience: &mut Patience<'_>) -> bool {
    queue.offer(0, parts);
    queue.kick();
    patience.wait(setting.frequency, PATIENCE_US, || queue.take().is_some())
}

fn is_zero(page: u64) -> bool {
    let words = page as *const u64;
    // SAFETY: the page is RAM that the layout gave to the balloon.
    (0..crate::pattern::WORDS).all(|index| unsafe { core::ptr::read_volatile(words.add(index)) } == 0)
}
