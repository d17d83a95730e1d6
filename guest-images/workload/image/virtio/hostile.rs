//! What no driver should hand to a disk, to see what it makes of that, and that it works after a reset.

use super::Patience;
use super::block::Disk;
use super::queue::{Descriptor, INDIRECT, NEXT, WRITABLE};
use crate::command::Case;
use crate::device_report::Hostile;
use crate::layout::LIMIT;
use crate::tsc::Frequency;

/// In the status register.
const NEEDS_RESET: u8 = 0x40;
/// A device that has not answered by then does not answer.
const PATIENCE_US: u64 = 500_000;
/// Between looks at the status register, each of which is an exit.
const LOOK_US: u64 = 1000;

/// Does it, on a disk that has nothing under way.
pub fn attack(disk: &mut Disk, case: Case, frequency: Frequency, patience: &mut Patience<'_>) -> Hostile {
    let start = patience.clock.read();
    let (header, status, data) = disk.scratch();
    hand_over(disk, case, (header, status, data));
    let (mut answered, mut device, mut next_look) = (false, 0, 0);
    patience.wait(frequency, PATIENCE_US, || {
        answered |= disk.queue.take().is_some();
        let now = crate::tsc::now();
        if now >= next_look {
            next_look = now + frequency.ticks(LOOK_US);
            device = disk.transport.status();
        }
        device & NEEDS_RESET != 0 || answered
    });
    // SAFETY: the status in the first request's page.
    let request_status = unsafe { core::ptr::read_volatile(status as *const u8) };
    let works = disk.restart() && reads(disk, frequency, patience);
    Hostile {
        status: u32::from(device),
        answered: u32::from(answered),
        request_status: u32::from(request_status),
        works: u32::from(works),
        took_us: frequency.us(patience.clock.read().saturating_sub(start)),
    }
}

fn hand_over(disk: &mut Disk, case: Case, (header, status, data): (u64, u64, u64)) {
    let queue = &mut disk.queue;
    let head = Descriptor { flags: NEXT, next: 1, ..Descriptor::readable(header, 16) };
    let body =
        |address, length| Descriptor { flags: NEXT | WRITABLE, next: 2, ..Descriptor::writable(address, length) };
    let last = Descriptor::writable(status, 1);
    let mut chain = |parts: [Descriptor; 3]| {
        parts.into_iter().enumerate().for_each(|(index, part)| queue.write(index as u16, part));
        queue.publish(0);
        queue.ring();
    };
    match case {
        Case::Loop => chain([head, Descriptor { next: 1, ..body(data, 512) }, last]),
        Case::Huge => {
            // As many as the table has, each of them 2^32 - 1 bytes.
            let size = queue.size();
            queue.write(0, head);
            for index in 1..size {
                let flags = if index + 1 == size { WRITABLE } else { NEXT | WRITABLE };
                queue.write(index, Descriptor { address: data, length: u32::MAX, flags, next: index + 1 });
            }
            queue.publish(0);
            queue.ring();
        }
        Case::Outside => chain([head, body(LIMIT << 4, 4096), last]),
        Case::Wraps => chain([head, body(u64::MAX - 511, 4096), last]),
        Case::Index => chain([head, Descriptor { next: u16::MAX, ..body(data, 512) }, last]),
        Case::Head => {
            queue.publish(u16::MAX);
            queue.ring();
        }
        Case::Indirect => {
            // A table whose only entry is the table.
            let table = Descriptor { address: data, length: 16, flags: INDIRECT, next: 0 };
            // SAFETY: the buffer is the driver's.
            unsafe { core::ptr::write_volatile(data as *mut Descriptor, table) };
            queue.write(0, table);
            queue.publish(0);
            queue.ring();
        }
        Case::Empty => {
            queue.write(0, last);
            queue.publish(0);
            queue.ring();
        }
        Case::Order => {
            chain([Descriptor { flags: NEXT | WRITABLE, ..head }, Descriptor { flags: NEXT, ..body(data, 512) }, last])
        }
        Case::Available => {
            let more = queue.size() + 1;
            queue.claim(more);
        }
    }
}

/// Whether the first block can be read.
fn reads(disk: &mut Disk, frequency: Frequency, patience: &mut Patience<'_>) -> bool {
    let (header, status, data) = disk.scratch();
    let parts = [Descriptor::readable(header, 16), Descriptor::writable(data, 512), Descriptor::writable(status, 1)];
    disk.queue.offer(0, &parts);
    disk.queue.kick();
    let answered = patience.wait(frequency, PATIENCE_US, || disk.queue.take().is_some());
    // SAFETY: as above.
    answered && unsafe { core::ptr::read_volatile(status as *const u8) } == 0
}
