//! `cargo xtask bench`

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};
use clap::Args;

use crate::step::{build_release, program, shown};
use crate::{lab, packages};

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// Name of the benchmark and its options, such as `cold --json FILE`; `cold --help` tells them. `kernel` measures what
    /// the project's kernel patches cost, and is the one that builds kernels for that.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "NAME")]
    rest: Vec<OsString>,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    match arguments.rest.first() {
        Some(name) if name == "kernel" => return lab::cost::main(&arguments.rest),
        Some(name) if name != "--help" && name != "-h" => {}
        _ => println!("kernel: what the project's kernel patches cost; `kernel --help` tells its options. And:"),
    }
    packages::ensure_installed()?;
    let [thermocline, agent, benches] = build_release(["thermocline", "memory-agent", "thermocline-benches"])?;
    let mut command = program(benches);
    command.env("THERMOCLINE_BIN", thermocline).env("MEMORY_AGENT_BIN", agent).args(&arguments.rest);
    // Paths among the options are meant from where the user is.
    command.current_dir(std::env::current_dir()?);
    eprintln!("$ {}", shown(&command));
    // In this process's place: what ends this, such as Ctrl-C or `timeout`, then reaches whoever has things to take down.
    Err(command.exec()).context("the benchmarks cannot be started")
}
