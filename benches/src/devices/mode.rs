//! What is done with a device.

use workload_guest::Command;
use workload_guest::block::Coverage;
use workload_guest::job::{DiskJob, Lasts, NetJob, Operation, Order};

/// Something that is done with a device for a while.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    /// Its name in tables.
    pub(super) name: &'static str,
    pub(super) what: What,
}

/// The same for each subject.
#[derive(Clone, Copy, Debug)]
pub(super) enum What {
    Disk(Disk),
    /// Frames of so many bytes from the guest.
    Send(u32),
    /// Frames of so many bytes to the guest.
    Receive(u32),
}

/// Requests to a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk {
    pub(super) operation: Operation,
    pub(super) order: Order,
    pub(super) bytes: u32,
    pub(super) depth: u32,
}

impl Disk {
    pub(super) fn is_write(&self) -> bool {
        self.operation == Operation::Write
    }
}

const fn disk(name: &'static str, operation: Operation, bytes: u32, depth: u32) -> Mode {
    let order = if bytes == SMALL { Order::Random } else { Order::Sequential };
    Mode { name, what: What::Disk(Disk { operation, order, bytes, depth }) }
}

const SMALL: u32 = 4096;
const LARGE: u32 = 1 << 20;
/// Large requests under way at a time: one that is served and one that waits.
const LARGE_DEPTH: u32 = 2;

/// All of them, in the order in which they are measured.
pub(super) const ALL: [Mode; 10] = [
    disk("read-4k-1", Operation::Read, SMALL, 1),
    disk("read-4k-32", Operation::Read, SMALL, 32),
    disk("write-4k-1", Operation::Write, SMALL, 1),
    disk("write-4k-32", Operation::Write, SMALL, 32),
    disk("read-1m", Operation::Read, LARGE, LARGE_DEPTH),
    disk("write-1m", Operation::Write, LARGE, LARGE_DEPTH),
    Mode { name: "send-64", what: What::Send(64) },
    Mode { name: "send-1500", what: What::Send(1500) },
    Mode { name: "receive-64", what: What::Receive(64) },
    Mode { name: "receive-1500", what: What::Receive(1500) },
];

impl Mode {
    /// What the guest is told.
    pub(super) fn command(&self, ms: u32) -> Command {
        let lasts = Lasts::Milliseconds(ms);
        match self.what {
            What::Disk(Disk { operation, order, bytes, depth }) => {
                Command::Disk(DiskJob { operation, order, bytes, depth, lasts, coverage: Coverage::Stamp })
            }
            What::Send(bytes) => Command::Net(NetJob::Send(bytes, lasts)),
            What::Receive(_) => Command::Net(NetJob::Receive(lasts)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_understands_every_mode() {
        for mode in ALL {
            let command = mode.command(1000);
            assert_eq!(command.to_string().parse(), Ok(command), "{}", mode.name);
        }
    }
}
