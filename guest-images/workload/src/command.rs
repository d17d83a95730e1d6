//! What can be typed on the guest's console: one command a line.
//!
//! Compiled into the image, which obeys them, and into the host library, which sends them.

use core::fmt;
use core::str::FromStr;

use crate::job::{DiskJob, NetJob};
use crate::options::MAX_RATE;

/// A command; its text form is what `Display` writes and `FromStr` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `check`: compare every page, working set and cold, and answer `checked_all`.
    Check,
    /// `stop`: leave the pages alone, go on reporting.
    Stop,
    /// `go`: work again after `stop`.
    Go,
    /// `rate N`: page operations a second from now on, 0 for as many as it can.
    Rate(u64),
    /// `writes N`: percent of the operations that rewrite their page from now on.
    Writes(u32),
    /// `reset-stall`: begin anew with the longest stall.
    ResetStall,
    /// `touch-cold N`: read and compare N cold pages chosen pseudo-randomly, and answer `touched`.
    TouchCold(u64),
    /// `disk …`: requests to the disk, see [`DiskJob`]; answers `disk_done` at its end.
    Disk(DiskJob),
    /// `disk-stop`: end the disk's job.
    DiskStop,
    /// `disk-flush`: have the disk keep what was written; answers `disk_done`.
    DiskFlush,
    /// `disk-discard FIRST COUNT`: give blocks back; answers `disk_done`.
    DiskDiscard(u64, u32),
    /// `disk-zero FIRST COUNT`: have blocks written with zeros; answers `disk_done`.
    DiskZero(u64, u32),
    /// `net-send …`, `net-receive …`, `net-echo …`: frames, see [`NetJob`]; answers `net_done` at its end.
    Net(NetJob),
    /// `net-stop`: end the network's job.
    NetStop,
    /// `free-fill`: write the pages that may be given back; answers `free`.
    FreeFill,
    /// `free-report`: tell the host that nobody needs their contents; answers `free`.
    FreeReport,
    /// `free-check`: read them: each is as filled, or zeros; answers `free`.
    FreeCheck,
    /// `balloon N`: have N of them in the balloon; answers `balloon`.
    Balloon(u64),
    /// `random N`: read N random bytes; answers `random`.
    Random(u64),
    /// `hostile CASE`: hand the disk what no driver should; answers `hostile`.
    Hostile(Case),
    /// `off`: power off.
    Off,
    /// `reset`: reset by the keyboard controller.
    Reset,
    /// `crash`: triple fault.
    Crash,
}

/// Descriptors that no driver should hand to a device: `hostile CASE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// `loop`: a chain that comes back to its start.
    Loop,
    /// `huge`: one of 2^32 - 1 bytes, many times.
    Huge,
    /// `outside`: one that is not in memory.
    Outside,
    /// `wraps`: one that ends behind the last address.
    Wraps,
    /// `index`: a chain that goes on outside of the table.
    Index,
    /// `head`: a chain that starts outside of the table.
    Head,
    /// `indirect`: an indirect table inside of an indirect table.
    Indirect,
    /// `empty`: a request without a header.
    Empty,
    /// `order`: what the device may write before what it reads.
    Order,
    /// `available`: more chains than the ring has entries.
    Available,
}

impl Case {
    /// Each, with its name.
    pub const ALL: [(&str, Self); 10] = [
        ("loop", Self::Loop),
        ("huge", Self::Huge),
        ("outside", Self::Outside),
        ("wraps", Self::Wraps),
        ("index", Self::Index),
        ("head", Self::Head),
        ("indirect", Self::Indirect),
        ("empty", Self::Empty),
        ("order", Self::Order),
        ("available", Self::Available),
    ];
}

impl FromStr for Command {
    type Err = UnknownCommand;

    fn from_str(line: &str) -> Result<Self, UnknownCommand> {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or_default();
        if name == "disk" {
            return DiskJob::parse(words).map(Self::Disk);
        }
        if let Ok(job) = NetJob::parse(name, words.clone()) {
            return Ok(Self::Net(job));
        }
        let argument = words.next();
        let count = || argument.and_then(|word| word.parse::<u64>().ok());
        let mut range = || Some((count()?, words.next()?.parse::<u32>().ok()?));
        let command = match name {
            "disk-discard" => range().map(|(first, count)| Self::DiskDiscard(first, count)).ok_or(UnknownCommand)?,
            "disk-zero" => range().map(|(first, count)| Self::DiskZero(first, count)).ok_or(UnknownCommand)?,
            "balloon" => Self::Balloon(count().ok_or(UnknownCommand)?),
            "random" => Self::Random(count().ok_or(UnknownCommand)?),
            "hostile" => {
                let case = Case::ALL.into_iter().find(|(name, _)| Some(*name) == argument);
                Self::Hostile(case.ok_or(UnknownCommand)?.1)
            }
            "rate" => Self::Rate(count().filter(|rate| *rate <= MAX_RATE).ok_or(UnknownCommand)?),
            "writes" => Self::Writes(count().filter(|percent| *percent <= 100).ok_or(UnknownCommand)? as u32),
            "touch-cold" => Self::TouchCold(count().ok_or(UnknownCommand)?),
            _ if argument.is_some() => return Err(UnknownCommand),
            "check" => Self::Check,
            "stop" => Self::Stop,
            "go" => Self::Go,
            "reset-stall" => Self::ResetStall,
            "disk-stop" => Self::DiskStop,
            "disk-flush" => Self::DiskFlush,
            "net-stop" => Self::NetStop,
            "free-fill" => Self::FreeFill,
            "free-report" => Self::FreeReport,
            "free-check" => Self::FreeCheck,
            "off" => Self::Off,
            "reset" => Self::Reset,
            "crash" => Self::Crash,
            _ => return Err(UnknownCommand),
        };
        if words.next().is_some() { Err(UnknownCommand) } else { Ok(command) }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Check => f.write_str("check"),
            Self::Stop => f.write_str("stop"),
            Self::Go => f.write_str("go"),
            Self::Rate(count) => write!(f, "rate {count}"),
            Self::Writes(percent) => write!(f, "writes {percent}"),
            Self::ResetStall => f.write_str("reset-stall"),
            Self::TouchCold(count) => write!(f, "touch-cold {count}"),
            Self::Disk(job) => job.fmt(f),
            Self::DiskStop => f.write_str("disk-stop"),
            Self::DiskFlush => f.write_str("disk-flush"),
            Self::DiskDiscard(first, count) => write!(f, "disk-discard {first} {count}"),
            Self::DiskZero(first, count) => write!(f, "disk-zero {first} {count}"),
            Self::Net(job) => job.fmt(f),
            Self::NetStop => f.write_str("net-stop"),
            Self::FreeFill => f.write_str("free-fill"),
            Self::FreeReport => f.write_str("free-report"),
            Self::FreeCheck => f.write_str("free-check"),
            Self::Balloon(pages) => write!(f, "balloon {pages}"),
            Self::Random(bytes) => write!(f, "random {bytes}"),
            Self::Hostile(wanted) => {
                let name = Case::ALL.iter().find(|(_, case)| case == wanted).map_or("?", |(name, _)| name);
                write!(f, "hostile {name}")
            }
            Self::Off => f.write_str("off"),
            Self::Reset => f.write_str("reset"),
            Self::Crash => f.write_str("crash"),
        }
    }
}

/// The line is not a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownCommand;

impl fmt::Display for UnknownCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "commands are check, stop, go, rate N, writes PERCENT, reset-stall, touch-cold N, off, reset, crash, and with \
             devices disk OPERATION ORDER BYTES DEPTH LASTS [stamp], disk-stop, disk-flush, disk-discard FIRST COUNT, \
             disk-zero FIRST COUNT, net-send BYTES LASTS, net-receive LASTS, net-echo LASTS, net-stop, free-fill, \
             free-report, free-check, balloon N, random N and hostile CASE",
        )
    }
}

impl core::error::Error for UnknownCommand {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Coverage;
    use crate::job::{Lasts, Operation, Order};
    use proptest::prelude::*;

    fn any_lasts() -> impl Strategy<Value = Lasts> {
        prop_oneof![Just(Lasts::Once), Just(Lasts::Forever), any::<u32>().prop_map(Lasts::Milliseconds)]
    }

    fn any_disk_job() -> impl Strategy<Value = Command> {
        let operation = prop::sample::select(vec![Operation::Read, Operation::Write, Operation::Mixed]);
        let order = prop::sample::select(vec![Order::Random, Order::Sequential]);
        let coverage = prop::sample::select(vec![Coverage::Full, Coverage::Stamp]);
        (operation, order, 1u32..=64, 1u32..=32, any_lasts(), coverage).prop_map(
            |(operation, order, blocks, depth, lasts, coverage)| {
                Command::Disk(DiskJob { operation, order, bytes: blocks * 4096, depth, lasts, coverage })
            },
        )
    }

    fn any_net_job() -> impl Strategy<Value = Command> {
        prop_oneof![
            (32u32..=1514, any_lasts()).prop_map(|(bytes, lasts)| NetJob::Send(bytes, lasts)),
            any_lasts().prop_map(NetJob::Receive),
            any_lasts().prop_map(NetJob::Echo),
        ]
        .prop_map(Command::Net)
    }

    fn any_command() -> impl Strategy<Value = Command> {
        prop_oneof![
            prop::sample::select(vec![
                Command::Check,
                Command::Stop,
                Command::Go,
                Command::ResetStall,
                Command::DiskStop,
                Command::DiskFlush,
                Command::NetStop,
                Command::FreeFill,
                Command::FreeReport,
                Command::FreeCheck,
                Command::Off,
                Command::Reset,
                Command::Crash,
            ]),
            (0..=MAX_RATE).prop_map(Command::Rate),
            (0u32..=100).prop_map(Command::Writes),
            any::<u64>().prop_map(Command::TouchCold),
            any::<u64>().prop_map(Command::Balloon),
            any::<u64>().prop_map(Command::Random),
            any::<(u64, u32)>().prop_map(|(first, count)| Command::DiskDiscard(first, count)),
            any::<(u64, u32)>().prop_map(|(first, count)| Command::DiskZero(first, count)),
            prop::sample::select(Case::ALL.to_vec()).prop_map(|(_, case)| Command::Hostile(case)),
            any_disk_job(),
            any_net_job(),
        ]
    }

    #[test]
    fn refuses_what_is_not_a_command() {
        for line in [
            "",
            "halt",
            "stop now",
            "rate",
            "rate x",
            "rate 1 2",
            "writes 101",
            "touch-cold -1",
            "disk",
            "disk read random 4096 1",
            "disk read random 512 1 once",
            "disk read random 0 1 once",
            "disk read random 4096 33 once",
            "disk read random 1048576 9 once",
            "disk read random 2097152 1 once",
            "disk read random 4096 1 once stamp more",
            "disk-zero 1",
            "net-send 31 once",
            "net-send 1515 once",
            "net-echo",
            "net-receive 1 2",
            "hostile",
            "hostile host",
        ] {
            assert_eq!(line.parse::<Command>(), Err(UnknownCommand), "{line}");
        }
    }

    proptest! {
        #[test]
        fn display_and_from_str_agree(command in any_command()) {
            prop_assert_eq!(command.to_string().parse(), Ok(command));
        }
    }
}
