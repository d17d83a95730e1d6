//! What is measured, and the peers it is measured against. `cargo xtask bench NAME` builds and runs this.
//!
//! A new benchmark is a module with its `Arguments` and `main`, and a line in [`Bench`]. The rest is shared: [`subject`]
//! and [`peer`] are the monitors that are compared, [`guest_ram`], [`process`] and [`sampler`] look at them from outside
//! and in the same way for each, and [`table`] makes rows into medians, a table and JSON.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod cold;
mod console;
mod devices;
mod disturbance;
mod guard;
mod guest_ram;
mod lazy;
mod lines;
mod migration;
mod peer;
mod probe;
mod process;
mod sampler;
mod stop;
mod subject;
mod sys;
mod table;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use command_line::Program;

/// Measures Thermocline beside its peers.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask bench",
    bin_name = "cargo xtask bench",
    arg_required_else_help = true,
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Migration of a guest that is mostly swapped out, fully resident, or idle, and start-up, beside stock QEMU.
    Cold(cold::Arguments),
    /// Disk and network: requests and frames a second and what each costs, beside stock QEMU's devices and the host's own
    /// file and tap.
    Devices(devices::Arguments),
    /// QEMU's own migration of a guest that is mostly swapped out, with and without `memory-agent guard` beside it.
    Guard(guard::Arguments),
    /// Migration that leaves cold memory for later, beside that which does not, and beside stock QEMU's pre-copy and
    /// post-copy; with verdicts against targets.
    Lazy(lazy::Arguments),
    /// What asking about pages costs, for each probe and pattern, beside the system calls alone.
    Probe(probe::Arguments),
}

/// This program, by the name that stands in front of what it says.
const PROGRAM: Program = Program::new("cargo xtask bench");

fn main() -> ExitCode {
    let arguments = Cli::parse();
    let result = stop::on_signals().and_then(|()| match arguments.bench {
        Bench::Cold(arguments) => cold::main(&arguments),
        Bench::Devices(arguments) => devices::main(&arguments),
        Bench::Guard(arguments) => guard::main(&arguments),
        Bench::Lazy(arguments) => lazy::main(&arguments),
        Bench::Probe(arguments) => probe::main(&arguments),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // The signal may have ended a child first, whose end is then no news.
            let e = stop::check().err().unwrap_or(e);
            PROGRAM.say(format_args!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}
