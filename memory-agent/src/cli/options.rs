//! What several subcommands take.

use std::time::Duration;

use clap::Args;
use command_line::End;
use memory_agent::Process;

use super::exit::end_of;
use super::opened::Opened;

/// Whose memory.
#[derive(Clone, Debug, Args)]
pub(crate) struct Memory {
    /// The process whose shared memory this is about, such as a virtual machine monitor.
    #[arg(long, value_name = "PID")]
    pub(crate) pid: u32,
    /// Only shared memory files whose name contains this, such as `guest-ram` [default: all].
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) name: String,
}

impl Memory {
    /// All of it, the largest piece first. What cannot be worked with is said.
    ///
    /// # Errors
    /// When there is none, or it may not be looked at.
    pub(crate) fn open(&self) -> Result<Opened, End> {
        let found = Process::open(self.pid).and_then(|process| process.shared_memory(&self.name));
        found.map(Opened::new).map_err(end_of)
    }
}

/// A time as people write it: a number with `us`, `ms`, `s`, `m` or `h`. None at all is refused.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let wrong = || format!("'{text}' is not a time: write a number and a unit, such as 500ms, 2s or 10m");
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit.trim() {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    match Duration::try_from_secs_f64(number * seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err(format!("'{text}' is no time at all: use a longer one")),
        Err(_) => Err(format!("'{text}' is longer than anybody waits")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_written() {
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2 m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("250us"), Ok(Duration::from_micros(250)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "1", "s", "-1s", "0s", "1.2.3s", "5 parsecs", "1e400s", &format!("{}s", "9".repeat(30))] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
