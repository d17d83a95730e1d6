//! The command line: one file a subcommand. They say what to do and print what happened; the library does it.

mod daemon;
mod exit;
mod guard;
mod idle;
mod map;
mod map_file;
mod metrics;
mod opened;
mod options;
mod output;
mod page_out;
mod scan;
mod stop;
mod watch;

use clap::{CommandFactory, Parser, Subcommand};
use command_line::{CompletionsArguments, End, ManPagesArguments};

const MORE: &str = "\
Examples:
  memory-agent map --pid 4711                     what is resident and what is swapped
  memory-agent page-out --pid 4711 --all          swap all of it out
  memory-agent scan hash --pid 4711               read it, and leave it as it was
  memory-agent guard --pid 4711 -- ./backup.sh    the same when others read it
  memory-agent daemon --pid 4711 --metrics /var/lib/node_exporter/memory.prom

Exit codes:
  0  done                     4    no right to do that: run as root
  1  something else failed    5    no swap, or no room in it
  2  wrong command line       127  guard: its command cannot be started
  3  no such process,         130  interrupted before it was done
     or it has ended
`guard -- COMMAND` exits with the code of the command, or with 128 and the
number of the signal that ended it.";

/// What the host has done with a process's shared memory: which pages are in memory, which are swapped out and which were
/// never written; and how to page out, read or guard them without changing that.
///
/// It works on any process that shares memory files (memfd, tmpfs), such as QEMU with `memory-backend-memfd`,
/// Cloud Hypervisor and Thermocline, while it runs, and needs nothing of it. Most of it needs root.
#[derive(Debug, Parser)]
#[command(name = "memory-agent", version, max_term_width = 110, after_help = MORE)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show which pages are holes, resident and swapped; changes nothing.
    Map(map::Arguments),
    /// The same, again and again.
    Watch(watch::Arguments),
    /// Page out, and say whether it happened.
    PageOut(page_out::Arguments),
    /// Read all memory and leave residency as it was.
    Scan(scan::Arguments),
    /// Keep residency as it is while somebody else reads the memory.
    Guard(guard::Arguments),
    /// Keep a map fresh at a bounded cost, page out again what readers swap in, tell Prometheus.
    Daemon(daemon::Arguments),
    /// Print a script that completes this program's options in a shell.
    Completions(CompletionsArguments),
    /// Write manual pages.
    #[command(hide = true)]
    ManPages(ManPagesArguments),
}

/// Runs the command line and gives the code to exit with.
pub(crate) fn main() -> std::process::ExitCode {
    let result: Result<(), End> = match Cli::parse().command {
        Command::Map(arguments) => map::main(&arguments),
        Command::Watch(arguments) => watch::main(&arguments),
        Command::PageOut(arguments) => page_out::main(&arguments),
        Command::Scan(arguments) => scan::main(&arguments),
        Command::Guard(arguments) => guard::main(&arguments),
        Command::Daemon(arguments) => daemon::main(&arguments),
        Command::Completions(arguments) => arguments.print(&mut Cli::command()),
        Command::ManPages(arguments) => arguments.write(Cli::command()),
    };
    output::PROGRAM.end(result)
}
