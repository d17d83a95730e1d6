//! What can be typed on the guest's console: one command a line.
//!
//! Compiled into the image, which obeys them, and into the host library, which sends them.

use core::fmt;
use core::str::FromStr;

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
    /// `off`: power off.
    Off,
    /// `reset`: reset by the keyboard controller.
    Reset,
    /// `crash`: triple fault.
    Crash,
}

impl FromStr for Command {
    type Err = UnknownCommand;

    fn from_str(line: &str) -> Result<Self, UnknownCommand> {
        let mut words = line.split_ascii_whitespace();
        let (name, argument) = (words.next().unwrap_or_default(), words.next());
        let count = || argument.and_then(|word| word.parse::<u64>().ok());
        let command = match name {
            "rate" => Self::Rate(count().filter(|rate| *rate <= MAX_RATE).ok_or(UnknownCommand)?),
            "writes" => Self::Writes(count().filter(|percent| *percent <= 100).ok_or(UnknownCommand)? as u32),
            "touch-cold" => Self::TouchCold(count().ok_or(UnknownCommand)?),
            _ if argument.is_some() => return Err(UnknownCommand),
            "check" => Self::Check,
            "stop" => Self::Stop,
            "go" => Self::Go,
            "reset-stall" => Self::ResetStall,
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
            "commands are check, stop, go, rate N, writes PERCENT, reset-stall, touch-cold N, off, reset and crash",
        )
    }
}

impl core::error::Error for UnknownCommand {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_command() -> impl Strategy<Value = Command> {
        prop_oneof![
            prop::sample::select(vec![
                Command::Check,
                Command::Stop,
                Command::Go,
                Command::ResetStall,
                Command::Off,
                Command::Reset,
                Command::Crash,
            ]),
            (0..=MAX_RATE).prop_map(Command::Rate),
            (0u32..=100).prop_map(Command::Writes),
            any::<u64>().prop_map(Command::TouchCold),
        ]
    }

    #[test]
    fn refuses_what_is_not_a_command() {
        for line in ["", "halt", "stop now", "rate", "rate x", "rate 1 2", "writes 101", "touch-cold -1"] {
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
