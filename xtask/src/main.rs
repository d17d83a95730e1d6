//! `cargo xtask`: everything that a person or CI runs. One file a command.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod apt;
mod bench;
mod cpio;
mod debian;
mod error_causes;
mod fuzz;
mod guest;
mod host;
mod kvm;
mod lab;
mod lint;
mod man;
mod outcome;
mod packages;
mod step;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use command_line::Program;

/// Builds, tests, checks and measures Thermocline.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", arg_required_else_help = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every test, after installing what they need. As root they set up swap, network namespaces, control groups and
    /// loop devices of their own on this host, and take them down.
    Test(test::Arguments),
    /// Check formatting, lints and documentation.
    Lint,
    /// Build the project's kernel, and run the project on it in an emulated machine.
    Lab(lab::Arguments),
    /// Let every user of this machine open /dev/kvm, by a udev rule: for machines that are thrown away afterwards.
    Kvm,
    /// Make a guest that is not embedded, and boot it.
    Guest(guest::Arguments),
    /// Drive devices with guests that do whatever breaks them, made of random bytes.
    Fuzz(fuzz::Arguments),
    /// Write manual pages of both programs.
    Man,
    /// Run a benchmark.
    Bench(bench::Arguments),
}

/// This program, by the name that stands in front of what it says.
const PROGRAM: Program = Program::new("cargo xtask");

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Test(arguments) => test::main(&arguments),
        Command::Lint => lint::main(),
        Command::Lab(arguments) => lab::main(&arguments),
        Command::Kvm => kvm::main(),
        Command::Guest(arguments) => guest::main(&arguments),
        Command::Fuzz(arguments) => fuzz::main(&arguments),
        Command::Man => man::main(),
        Command::Bench(arguments) => bench::main(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // A sentence, and no backtrace, whatever the environment says: what failed has said its own above.
            PROGRAM.say(format_args!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}
