//! `thermocline ctl`

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use command_line::{End, Output};
use memory_agent::ByteSize;

use super::ApiSocket;
use crate::control::client::ask;
use crate::control::{Answer, Request};

/// Options of `thermocline ctl`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    api: ApiSocket,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What the machine is doing, as JSON.
    Status,
    /// Stop the guest.
    Pause,
    /// Let the guest go on.
    Resume {
        /// Also when the guest was handed over and may run elsewhere: only if you know that it does not.
        #[arg(long)]
        force: bool,
    },
    /// Page out the guest's memory, as JSON what came of it.
    PageOut {
        /// Only this range of guest physical addresses, as START+LENGTH in bytes, decimal or 0x…; may be repeated.
        #[arg(long, value_name = "START+LENGTH", value_parser = range)]
        range: Vec<(u64, u64)>,
    },
    /// What the balloon holds and what the guest says of its memory, as JSON.
    Balloon {
        /// Ask the guest to give this much of its memory from now on.
        #[arg(long, value_name = "SIZE")]
        size: Option<ByteSize>,
    },
    /// What Prometheus wants to know, in its text format.
    Metrics,
    /// What a migration that is under way is doing, or the last one has come to, as JSON.
    Migration,
    /// Wait for the end of the migration that is under way, or of the last one, and print its result as JSON.
    WaitMigration {
        /// Only for this one.
        #[arg(long, value_name = "ID")]
        id: Option<u64>,
    },
    /// Give up a migration that is under way; the guest stays.
    CancelMigration,
    /// Keep what there is of a paused guest: its memory in a sparse file, each byte at its guest physical address, and
    /// registers, devices and what is missing in FILE.json.
    Dump {
        /// The file, which must not exist.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Go on with a migration whose connection is gone while pages were outstanding. On either side: one
    /// connects to where the other listens, and `receive` listens all the time.
    Reconnect {
        /// Where the other side listens: `tcp:HOST:PORT` or `unix:PATH`.
        #[arg(long, value_name = "ADDRESS", conflicts_with = "listen", required_unless_present = "listen")]
        to: Option<String>,
        /// Where to listen for the other side.
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<String>,
    },
    /// Press the power button: a Linux guest shuts down, if its ACPI button driver is there.
    PowerButton,
    /// End the machine.
    Quit {
        /// Also when pages of a guest that runs elsewhere are only here: it is lost without them.
        #[arg(long)]
        force: bool,
    },
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let number = |text: &str| {
        let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
        parsed.map_err(|e| format!("'{text}': {e}"))
    };
    let (start, length) = text.split_once('+').ok_or("write START+LENGTH, such as 0x200000+1048576")?;
    Ok((number(start)?, number(length)?))
}

/// The monitor may work in another directory.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let request = match &arguments.command {
        Command::Status => Request::Status {},
        Command::Pause => Request::Pause {},
        Command::Resume { force } => Request::Resume { force: *force },
        Command::PageOut { range } => Request::PageOut { ranges: (!range.is_empty()).then(|| range.clone()) },
        Command::Balloon { size } => Request::Balloon { size: *size },
        Command::Metrics => Request::Metrics {},
        Command::Migration => Request::Migration {},
        Command::WaitMigration { id } => Request::WaitMigration { id: *id },
        Command::CancelMigration => Request::CancelMigration {},
        Command::Dump { to } => Request::Dump { to: absolute(to) },
        Command::Reconnect { to, listen } => Request::Reconnect { to: to.clone(), listen: listen.clone() },
        Command::PowerButton => Request::PowerButton {},
        Command::Quit { force } => Request::Quit { force: *force },
    };
    // What was asked for is done, whether or not anybody reads what came of it.
    let mut output = Output::default();
    Ok(match ask(&arguments.api.api_socket, &request, |_| {})? {
        Answer::Done => Ok(()),
        Answer::Status(status) => output.print_json(&status),
        Answer::Metrics(text) => output.print(&text),
        Answer::Dump(report) => output.print_json(&report),
        Answer::PageOut(report) => output.print_json(&report),
        Answer::Balloon(status) => output.print_json(&status),
        Answer::Migration(status) => output.print_json(&status),
        Answer::Migrated(report) => output.print_json(&report),
        other => output.print_json(&other),
    }?)
}
