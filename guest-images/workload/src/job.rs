//! Work for a device, as it is asked for on the console.
//!
//! Compiled into the image and into the host library.

use core::fmt;
use core::str::FromStr;

use crate::block::{BLOCK, Coverage};
use crate::command::UnknownCommand;
use crate::frame;

/// How long a job goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasts {
    /// So many milliseconds, during which the console is left alone: each byte there is an exit to the host.
    Milliseconds(u32),
    /// `once`: until each block of the disk, or so many frames as there are buffers, had its turn.
    Once,
    /// `forever`: until it is stopped or another takes its place.
    Forever,
}

/// The direction of a disk's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `read`: and check.
    Read,
    /// `write`: as of the next generation.
    Write,
    /// `mixed`: reads and writes, pseudo-randomly, and a flush now and then.
    Mixed,
}

/// Which blocks have their turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Pseudo-randomly.
    Random,
    /// One behind the other, from the first on.
    Sequential,
}

/// Requests to the disk: `disk OPERATION ORDER BYTES DEPTH LASTS [stamp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskJob {
    /// What to do.
    pub operation: Operation,
    /// Where.
    pub order: Order,
    /// Bytes a request: a multiple of 4 KiB, at most [`MOST_BYTES`].
    pub bytes: u32,
    /// Requests under way at a time, 1 to [`MOST_DEPTH`]; all of them together at most [`MOST_UNDER_WAY`] bytes.
    pub depth: u32,
    /// How long.
    pub lasts: Lasts,
    /// How much of each block is written.
    pub coverage: Coverage,
}

/// The largest request, bytes.
pub const MOST_BYTES: u32 = 1 << 20;
/// The most requests under way.
pub const MOST_DEPTH: u32 = 32;
/// The most bytes under way.
pub const MOST_UNDER_WAY: u32 = 8 << 20;

/// Frames: `net-send BYTES LASTS`, `net-receive LASTS`, `net-echo LASTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetJob {
    /// Sends frames of so many bytes, [`frame::HEAD`] to [`frame::LONGEST`], as quickly as they go.
    Send(u32, Lasts),
    /// Checks what comes.
    Receive(Lasts),
    /// Checks what comes and sends it back.
    Echo(Lasts),
}

impl DiskJob {
    /// Reads what stands behind `disk`.
    pub(crate) fn parse<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<Self, UnknownCommand> {
        let mut next = || words.next().ok_or(UnknownCommand);
        let operation = match next()? {
            "read" => Operation::Read,
            "write" => Operation::Write,
            "mixed" => Operation::Mixed,
            _ => return Err(UnknownCommand),
        };
        let order = match next()? {
            "random" => Order::Random,
            "sequential" => Order::Sequential,
            _ => return Err(UnknownCommand),
        };
        let (bytes, depth) = (number(next()?)?, number(next()?)?);
        let lasts = next()?.parse()?;
        let coverage = match words.next() {
            None => Coverage::Full,
            Some("stamp") => Coverage::Stamp,
            Some(_) => return Err(UnknownCommand),
        };
        let bad = words.next().is_some()
            || bytes == 0
            || u64::from(bytes) % BLOCK != 0
            || bytes > MOST_BYTES
            || !(1..=MOST_DEPTH).contains(&depth)
            || bytes * depth > MOST_UNDER_WAY;
        if bad { Err(UnknownCommand) } else { Ok(Self { operation, order, bytes, depth, lasts, coverage }) }
    }
}

impl NetJob {
    /// Reads a command of this name, if it is one of these, from what stands behind it.
    pub(crate) fn parse<'a>(name: &str, mut words: impl Iterator<Item = &'a str>) -> Result<Self, UnknownCommand> {
        let mut next = || words.next().ok_or(UnknownCommand);
        let job = match name {
            "net-send" => {
                let bytes = number(next()?)?;
                if !(frame::HEAD..=frame::LONGEST).contains(&(bytes as usize)) {
                    return Err(UnknownCommand);
                }
                Self::Send(bytes, next()?.parse()?)
            }
            "net-receive" => Self::Receive(next()?.parse()?),
            "net-echo" => Self::Echo(next()?.parse()?),
            _ => return Err(UnknownCommand),
        };
        if words.next().is_some() { Err(UnknownCommand) } else { Ok(job) }
    }

    /// How long it goes on.
    pub fn lasts(self) -> Lasts {
        match self {
            Self::Send(_, lasts) | Self::Receive(lasts) | Self::Echo(lasts) => lasts,
        }
    }
}

fn number(word: &str) -> Result<u32, UnknownCommand> {
    word.parse().map_err(|_| UnknownCommand)
}

impl FromStr for Lasts {
    type Err = UnknownCommand;

    fn from_str(word: &str) -> Result<Self, UnknownCommand> {
        match word {
            "once" => Ok(Self::Once),
            "forever" => Ok(Self::Forever),
            _ => number(word).map(Self::Milliseconds),
        }
    }
}

impl fmt::Display for Lasts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Milliseconds(count) => write!(f, "{count}"),
            Self::Once => f.write_str("once"),
            Self::Forever => f.write_str("forever"),
        }
    }
}

impl fmt::Display for DiskJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = match self.operation {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Mixed => "mixed",
        };
        let order = match self.order {
            Order::Random => "random",
            Order::Sequential => "sequential",
        };
        let coverage = match self.coverage {
            Coverage::Full => "",
            Coverage::Stamp => " stamp",
        };
        write!(f, "disk {operation} {order} {} {} {}{coverage}", self.bytes, self.depth, self.lasts)
    }
}

impl fmt::Display for NetJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Send(bytes, lasts) => write!(f, "net-send {bytes} {lasts}"),
            Self::Receive(lasts) => write!(f, "net-receive {lasts}"),
            Self::Echo(lasts) => write!(f, "net-echo {lasts}"),
        }
    }
}
