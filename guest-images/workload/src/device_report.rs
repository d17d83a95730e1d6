//! What the guest says of devices, in the manner of [`report`](crate::report).

use core::fmt;

use crate::extents::Extents;
use crate::report::{Json, lines};

lines! {
    /// Behind `ready`, when devices were asked for: what was found.
    "devices" Devices {
        /// Blocks of 4 KiB on the disk, 0 without one.
        disk_blocks: u64,
        /// How many of them are used.
        disk_used: u64,
        /// The first six bytes of the network device's configuration as a big-endian number: its address.
        net_mac: u64,
        /// Whether there is a balloon, and how: 0 none, 1 without reporting, 2 with.
        balloon: u32,
        /// Whether there is a source of randomness.
        random: u32,
        /// Memory that may be given back.
        free: Extents,
        /// Whether interrupts are used: 1, or polling: 0.
        interrupts: u32,
    }

    /// With each report, where there is a disk: counts since boot.
    "disk" Disk {
        /// Requests that read.
        reads: u64,
        /// Requests that wrote.
        writes: u64,
        /// Requests that flushed, discarded or wrote zeros.
        others: u64,
        /// Requests that the device failed.
        errors: u64,
        /// Blocks that were not as written.
        bad: u64,
        /// Answers to what was not asked, or had been answered before.
        repeated: u64,
        /// Requests under way.
        under_way: u32,
        /// How long the oldest of them has been; 0 without one. One that is lost stays, and no job ends behind it.
        oldest_us: u64,
        /// The longest that a request took since boot.
        longest_us: u64,
    }

    /// The end of a job of the disk.
    "disk_done" DiskDone {
        /// Requests that ended.
        requests: u64,
        /// Bytes that they carried.
        bytes: u64,
        /// Requests that the device failed.
        errors: u64,
        /// Blocks that were not as written.
        bad: u64,
        /// Answers to what was not asked, or had been answered before.
        repeated: u64,
        /// Blocks that were found as written by this guest since it booted.
        known: u64,
        /// From the first request to the end of the last.
        took_us: u64,
        /// The longest that a request took.
        longest_us: u64,
        /// Times that the device was told of requests: an exit each.
        kicks: u64,
        /// Interrupts that came.
        interrupts: u64,
    }

    /// A block of the disk that is not as written; only the first few are told.
    "bad_block" BadBlock {
        /// Its number.
        block: u64,
        /// The first wrong word, 0 to 511; 512 when the block is whole, but another generation.
        word: u32,
        /// What was written there: a word, or a generation.
        expected: u64,
        /// What is there.
        found: u64,
    }

    /// With each report, where there is a network device: counts since boot.
    "net" Net {
        /// Frames handed to the device.
        sent: u64,
        /// Good frames that came.
        received: u64,
        /// Numbers that were passed over.
        lost: u64,
        /// Frames that came twice.
        duplicate: u64,
        /// Frames that were damaged.
        corrupt: u64,
        /// Frames of somebody else.
        other: u64,
        /// Frames that were sent back, and for which there was no room.
        no_room: u64,
        /// Announcements sent because the device had asked for one.
        announced: u64,
    }

    /// The end of a job of the network device.
    "net_done" NetDone {
        /// Frames that the device took.
        sent: u64,
        /// Good frames that came.
        received: u64,
        /// Numbers that were passed over.
        lost: u64,
        /// Frames that came twice.
        duplicate: u64,
        /// Frames that were damaged.
        corrupt: u64,
        /// How long it took.
        took_us: u64,
        /// Times that the device was told of buffers: an exit each.
        kicks: u64,
        /// Interrupts that came.
        interrupts: u64,
    }

    /// The answer to `free-fill`, `free-report` and `free-check`.
    "free" Free {
        /// Pages filled, reported or looked at.
        pages: u64,
        /// How many of them were zeros.
        zeros: u64,
        /// How many of them were as filled.
        kept: u64,
        /// How many of them were neither.
        errors: u64,
        /// How long it took.
        took_us: u64,
    }

    /// The answer to `balloon`.
    "balloon" Balloon {
        /// Pages in it.
        pages: u64,
        /// How many the host asks for.
        wanted: u64,
        /// How long it took.
        took_us: u64,
    }

    /// The answer to `random`.
    "random" RandomBytes {
        /// Bytes that came.
        bytes: u64,
        /// Bits in them that are one.
        ones: u64,
        /// How long it took.
        took_us: u64,
    }

    /// The answer to `hostile`.
    "hostile" Hostile {
        /// The device's status byte afterwards; bit 6 is `DEVICE_NEEDS_RESET`.
        status: u32,
        /// Whether the request was answered.
        answered: u32,
        /// The status byte of the request, 255 if nothing wrote it.
        request_status: u32,
        /// Whether the device works again after a reset.
        works: u32,
        /// How long it took.
        took_us: u64,
    }
}
