//! The command line: one file a subcommand. They say what to do and print what happened; they decide nothing.

mod choices;
mod config_file;
mod consoles;
mod ctl;
mod demo;
mod doctor;
mod effective;
mod end;
mod migrate;
mod nets;
mod pages;
mod progress;
mod receive;
mod run;
mod table;
mod vsock;

use std::path::PathBuf;

use choices::{Cold, When};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use command_line::{CompletionsArguments, End, ManPagesArguments};
use config_file::DescriptionArguments;
use consoles::ConsoleArguments;
use effective::EffectiveOptions;
use memory_agent::{Agent, AgentOptions, ByteSize, KernelOffer, ProbeChoice};

use crate::PROGRAM;
use crate::exit::ExitCode;
use crate::migration::source::Options;

/// A KVM virtual machine monitor that knows which guest pages the host has swapped out, and migrates a running guest
/// without waking them.
#[derive(Debug, Parser)]
#[command(name = "thermocline", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// See what this is about: a guest with most of its memory swapped out, migrated there and back.
    Demo(demo::Arguments),
    /// Run a virtual machine.
    Run(run::Arguments),
    /// Wait for a virtual machine to come from another host.
    Receive(receive::Arguments),
    /// Send a running virtual machine to another host.
    Migrate(migrate::Arguments),
    /// Control a running virtual machine.
    Ctl(ctl::Arguments),
    /// Show which pages of a running guest are holes, resident and swapped.
    Pages(pages::Arguments),
    /// Show what this host offers, and what follows from it.
    Doctor(doctor::Arguments),
    /// Print a script that completes this program's options in a shell.
    Completions(CompletionsArguments),
    /// Write manual pages.
    #[command(hide = true)]
    ManPages(ManPagesArguments),
}

/// How to reach a running machine.
#[derive(Clone, Debug, Args)]
struct ApiSocket {
    /// The machine's API socket, as given to `run` or `receive`.
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
}

/// How to migrate.
#[derive(Clone, Debug, Args)]
struct MigrationOptions {
    /// What happens to pages that the host has swapped out: `paced` reads them a window at a time and pages each window
    /// out again, `lazy` leaves them until the guest runs at the destination, `eager` reads them like all others.
    #[arg(long, value_enum, default_value_t = Options::default().cold.into())]
    cold: Cold,
    /// How much of the cold memory may be resident at a time.
    #[arg(long, value_name = "SIZE", default_value_t = Options::default().window)]
    window: ByteSize,
    /// How long the guest may be paused at switchover, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = Options::default().downtime_limit.as_millis() as u64)]
    downtime_limit: u64,
    /// After how many rounds of pre-copy to give up when the guest writes faster than the connection carries.
    #[arg(long, value_name = "N", default_value_t = Options::default().max_rounds)]
    max_rounds: u32,
    /// When the guest is switched over: once it `converged`, or `now`, after one round, with the rest by post-copy.
    #[arg(long, value_enum, default_value_t = Options::default().switchover.into())]
    switchover: When,
    /// How much post-copy sends a second that the guest does not wait for; 0 for no limit.
    #[arg(long, value_name = "SIZE", default_value_t = Options::default().cold_rate)]
    cold_rate: ByteSize,
}

/// How the machine's memory is watched.
#[derive(Clone, Debug, Args)]
struct AgentArguments {
    /// How much of one core the memory agent may use to know what each page of guest RAM is, percent; 0 for no agent.
    /// It runs only when nobody else needs the CPU.
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0)]
    agent_budget: f64,
    /// How it asks: `auto`, `page-cache`, `marker` or `uffd-marker`; `thermocline doctor` says what `auto` is here.
    #[arg(long, value_name = "PROBE", default_value_t = ProbeChoice::Auto)]
    probe: ProbeChoice,
}

impl AgentArguments {
    /// The agent as it is to be, if there is to be one.
    fn options(&self) -> Result<Option<AgentOptions>, End> {
        let options = AgentOptions { probe: self.probe, budget: self.agent_budget, ..AgentOptions::default() };
        if let ProbeChoice::Only(kind) = self.probe
            && let Some(why) = KernelOffer::of_this_host().why_not(kind)
        {
            return Err(End::text(ExitCode::Usage, format!("--probe {kind} is not possible here: {why}")));
        }
        if self.agent_budget == 0.0 {
            return Ok(None);
        }
        Agent::new(options).map_err(|e| End::text(ExitCode::Usage, format!("--agent-budget: {e}")))?;
        Ok(Some(options))
    }
}

/// Runs the command line and gives the code to exit with.
pub fn main() -> std::process::ExitCode {
    PROGRAM.log("THERMOCLINE_LOG");
    PROGRAM.end(run(std::env::args_os().collect()))
}

fn run(arguments: Vec<std::ffi::OsString>) -> Result<(), End> {
    let mut program = Cli::command();
    let matches = program.clone().get_matches_from(config_file::expand(&program, arguments)?);
    match Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit()).command {
        Command::Demo(arguments) => demo::main(&arguments),
        Command::Run(arguments) if arguments.description.dry_run => {
            run::check(&arguments)?;
            effective(&program, &matches)?.print(arguments.description.json)
        }
        Command::Run(arguments) => run::main(arguments),
        Command::Receive(arguments) if arguments.description.dry_run => {
            receive::check(&arguments)?;
            effective(&program, &matches)?.print(arguments.description.json)
        }
        Command::Receive(arguments) => receive::main(arguments),
        Command::Migrate(arguments) => migrate::main(&arguments),
        Command::Ctl(arguments) => ctl::main(&arguments),
        Command::Pages(arguments) => pages::main(&arguments),
        Command::Doctor(arguments) => doctor::main(&arguments),
        Command::Completions(arguments) => arguments.print(&mut program),
        Command::ManPages(arguments) => arguments.write(program),
    }
}

/// The options in force of the subcommand that was called.
fn effective(program: &clap::Command, matches: &clap::ArgMatches) -> Result<EffectiveOptions, End> {
    let of_subcommand =
        matches.subcommand().and_then(|(name, matches)| Some((program.find_subcommand(name)?, matches)));
    of_subcommand
        .map_or_else(|| Ok(EffectiveOptions::default()), |(command, matches)| EffectiveOptions::of(command, matches))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound_and_says_what_it_is() {
        Cli::command().debug_assert();
        assert_eq!(command_line::without_help(&Cli::command()), [""; 0]);
    }
}
