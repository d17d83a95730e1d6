//! `cargo xtask bench`

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use command_line::note;

use crate::step::{build, build_release, program, shown};
use crate::{lab, packages};

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true, after_help = "`cargo xtask bench NAME --help` tells a benchmark's options.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    benchmark: Benchmark,
}

/// Named here for the help, which is to be there before anything is built; a test compares the list with `benches/`.
#[derive(Debug, Subcommand)]
enum Benchmark {
    /// Migration of a guest that is mostly swapped out, fully resident, or idle, and start-up, beside stock QEMU.
    Cold(Options),
    /// Disk and network: requests and frames a second and what each costs, beside stock QEMU's devices and the host's own
    /// file and tap.
    Devices(Options),
    /// QEMU's own migration of a guest that is mostly swapped out, with and without `memory-agent guard` beside it.
    Guard(Options),
    /// Migration that leaves cold memory for later, beside that which does not, and beside stock QEMU's pre-copy and
    /// post-copy.
    Lazy(Options),
    /// What asking about pages costs, for each probe and pattern, beside the system calls alone.
    Probe(Options),
    /// What the project's kernel patches cost, in instructions, and how right the answers are that they give.
    Kernel(lab::cost::Arguments),
}

/// The benchmark's own.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
struct Options {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    rest: Vec<OsString>,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    match &arguments.benchmark {
        Benchmark::Kernel(arguments) => lab::cost::main(arguments),
        Benchmark::Cold(options) => run("cold", options),
        Benchmark::Devices(options) => run("devices", options),
        Benchmark::Guard(options) => run("guard", options),
        Benchmark::Lazy(options) => run("lazy", options),
        Benchmark::Probe(options) => run("probe", options),
    }
}

fn run(name: &str, Options { rest }: &Options) -> Result<()> {
    const BENCHES: &str = "thermocline-benches";
    let mut command = if rest.iter().any(|option| option == "--help" || option == "-h") {
        // Nothing is going to be measured: no packages, no monitor, and what compiles soonest.
        let [benches] = build([BENCHES], &[])?;
        program(benches)
    } else {
        packages::ensure_installed()?;
        let [thermocline, agent, benches] = build_release(["thermocline", "memory-agent", BENCHES])?;
        let mut command = program(benches);
        command.env("THERMOCLINE_BIN", thermocline).env("MEMORY_AGENT_BIN", agent);
        command
    };
    command.arg(name).args(rest);
    // Paths among the options are meant from where the user is.
    command.current_dir(std::env::current_dir()?);
    note(format_args!("$ {}", shown(&command)));
    // In this process's place: what ends this, such as Ctrl-C or `timeout`, then reaches whoever has things to take down.
    Err(command.exec()).context("the benchmarks cannot be started")
}

#[cfg(test)]
mod tests {
    use clap::{Parser, Subcommand};

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn every_benchmark_is_named() {
        let named = Benchmark::augment_subcommands(clap::Command::new(""));
        let named = named.get_subcommands().map(|command| command.get_name().to_owned());
        let main = std::fs::read_to_string(crate::step::root().join("benches/src/main.rs")).unwrap();
        // Such as `Cold(cold::Arguments),`.
        let there = main.lines().filter_map(|line| line.trim().strip_suffix("::Arguments),")?.split_once('('));
        let there: Vec<_> = there.map(|(_, name)| name.to_owned()).chain(["kernel".to_owned()]).collect();
        assert_eq!(named.collect::<Vec<_>>(), there);
    }

    #[test]
    fn options_are_the_benchmarks_own() {
        let of = |words: &[&str]| Cli::try_parse_from([&["bench"], words].concat()).map(|cli| cli.arguments.benchmark);
        let Ok(Benchmark::Cold(Options { rest })) = of(&["cold", "--json", "file", "--help"]) else {
            panic!("not cold")
        };
        assert_eq!(rest, ["--json", "file", "--help"]);
        for help in [&["--help"][..], &["kernel", "--help"]] {
            assert_eq!(of(help).unwrap_err().kind(), clap::error::ErrorKind::DisplayHelp);
        }
        assert!(of(&[]).is_err() && of(&["colt"]).is_err());
    }
}
