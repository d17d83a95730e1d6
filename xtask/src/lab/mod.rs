//! `cargo xtask lab`: a host of our own, with the project's kernel, in an emulated machine.
//!
//! | to read about | open |
//! |---|---|
//! | which kernels there are, and the cache of them | `kernel.rs` |
//! | a kernel's source, patched and compiled | `source.rs` |
//! | the project's programs, linked so that they run anywhere | `payload.rs` |
//! | the first programs the kernel runs | `initramfs.rs` |
//! | the emulated machine | `machine.rs` |
//! | what is run in it | `trials.rs` |

mod initramfs;
mod kernel;
mod machine;
mod payload;
mod source;
mod trials;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::packages;
use kernel::{Checks, Flavour, Series, Variant};
use machine::Machine;

/// Options of `cargo xtask lab`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the kernel, unless the cache has it.
    Build(Build),
    /// Boot it and run the project's tests in it.
    Test(Test),
    /// Boot it and give a prompt inside; `exit` ends it.
    Shell(Build),
}

#[derive(Debug, Args)]
struct Build {
    /// The kernel without the project's patches.
    #[arg(long)]
    stock: bool,
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value_t = Series::V6_12)]
    series: Series,
    /// What the kernel checks of itself.
    #[arg(long, value_enum, default_value_t = Checks::Vm)]
    checks: Checks,
    /// Boot this kernel image in place of building one; with --stock, if it has no patches.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Test {
    #[command(flatten)]
    build: Build,
    /// Only trials whose names contain one of these.
    #[arg(value_name = "NAME")]
    filter: Vec<String>,
    /// How long the machine may take, minutes.
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: u64,
}

impl Build {
    fn variant(&self) -> Variant {
        let flavour = if self.stock { Flavour::Stock } else { Flavour::Patched };
        Variant { series: self.series, flavour, checks: self.checks }
    }

    /// The kernel's image.
    fn kernel(&self) -> Result<PathBuf> {
        self.kernel.clone().map_or_else(|| kernel::build(self.variant()), Ok)
    }
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    packages::ensure_installed_for_lab()?;
    match &arguments.command {
        Command::Build(build) => {
            let kernel = build.kernel()?;
            println!("{}", kernel.display());
            Ok(())
        }
        Command::Test(test) => {
            let limit = Duration::from_secs(test.limit * 60);
            run_tests(test.build.variant(), &test.build.kernel()?, &test.filter, limit)
        }
        Command::Shell(build) => {
            let kernel = build.kernel()?;
            payload::build().context("the lab's programs")?;
            let initramfs = initramfs::make("").context("the lab's initramfs")?;
            let limit = Duration::MAX;
            machine::shell(&Machine {
                name: "shell",
                kernel: &kernel,
                initramfs: &initramfs,
                counts_instructions: false,
                limit,
            })
        }
    }
}

/// Boots a kernel and runs the project's tests in it.
///
/// # Errors
/// When one fails, or the machine does not come to an end.
fn run_tests(variant: Variant, kernel: &Path, filter: &[String], limit: Duration) -> Result<()> {
    payload::build().context("the lab's programs")?;
    let initramfs = initramfs::make(&trials::script(variant, filter)).context("the lab's initramfs")?;
    let results =
        machine::run(&Machine { name: "test", kernel, initramfs: &initramfs, counts_instructions: false, limit })?;
    let failed: Vec<_> =
        results.trials.iter().filter(|trial| trial.code != 0).map(|trial| trial.name.as_str()).collect();
    println!("lab, {variant}: {} trials, {} failed", results.trials.len(), failed.len());
    if !failed.is_empty() {
        bail!("in the lab failed: {}; the machine's log is {}", failed.join(", "), results.log.display());
    }
    if results.trials.is_empty() {
        bail!("nothing was run in the lab; the machine's log is {}", results.log.display());
    }
    Ok(())
}
