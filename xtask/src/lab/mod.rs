//! `cargo xtask lab`: a host of our own, with the project's kernel, in an emulated machine.
//!
//! | to read about | open |
//! |---|---|
//! | which kernels there are, and the cache of them | `kernel.rs` |
//! | a kernel's source, patched and compiled | `source.rs` |
//! | Debian's own kernels and their modules | `debian.rs` |
//! | the project's programs, linked so that they run anywhere | `payload.rs` |
//! | the first programs the kernel runs | `initramfs.rs` |
//! | the emulated machine, and the emulator | `machine.rs`, `qemu.rs` |
//! | what is run in it | `trials.rs` |
//! | what the patches cost, in instructions | `cost.rs` |

pub(crate) mod cost;
mod debian;
mod initramfs;
mod kernel;
mod machine;
mod payload;
mod qemu;
mod source;
mod trials;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use command_line::{Output, note};
use tempfile::TempPath;

use crate::packages;
use initramfs::Contents;
use kernel::{Checks, Flavour, Variant};
pub(crate) use kernel::{Series, cache};
use machine::{LabMachine, Processors, WithoutAWord};
pub(crate) use payload::static_program;
use trials::Load;

const KERNELS: &str = "Kernels: the project's own; its stock twin, which lacks only the patches (--stock); and the one that \
                       Debian ships, with modules (--debian, --debian=PACKAGE).";

/// How long a machine may take, if nobody says otherwise.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// Options of `cargo xtask lab`.
#[derive(Debug, Args)]
#[command(after_help = KERNELS)]
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
    /// Boot it and run a command inside, in the folder of the project's programs, by its shell.
    Run(Run),
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
    /// Debian's own cloud kernel of the series, a stock one with modules, or the one of this package (its name, or a .deb
    /// file). It is fetched with apt-get, unpacked and not installed.
    #[arg(long, value_name = "PACKAGE", num_args = 0..=1, require_equals = true)]
    #[arg(conflicts_with_all = ["stock", "checks", "kernel"])]
    debian: Option<Option<String>>,
    /// More for the kernel's command line. `tsc_early_khz=2594000` has it calibrate wrongly, which leaves guests without timers
    /// unless the monitor minds.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    append: String,
}

#[derive(Debug, Args)]
struct Test {
    #[command(flatten)]
    build: Build,
    /// Only trials whose names contain one of these [default: all but those of Linux guests, which take minutes each].
    #[arg(value_name = "NAME")]
    filter: Vec<String>,
    /// How long the machine may take, minutes.
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: u64,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    build: Build,
    /// How long the machine may take, minutes.
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: u64,
    /// The emulated processors take turns: slower, and the embedded guest is not lost when it migrates.
    #[arg(long)]
    in_turn: bool,
    /// The command, such as `./thermocline doctor`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Build {
    fn variant(&self) -> Variant {
        let flavour = if self.stock || self.debian.is_some() { Flavour::Stock } else { Flavour::Patched };
        Variant { series: self.series, flavour, checks: self.checks }
    }

    /// What is booted: fetched, built, or as it is.
    fn host(&self) -> Result<Host> {
        let variant = self.variant();
        let parameters = self.append.clone();
        if let Some(package) = &self.debian {
            let debian = debian::get(package.as_deref(), self.series).context("Debian's kernel")?;
            let (name, image) = (debian.name.clone(), debian.image.clone());
            return Ok(Host { name, variant, image, parameters, debian: Some(debian) });
        }
        if let Some(image) = &self.kernel {
            return Ok(Host { name: variant.to_string(), variant, image: image.clone(), parameters, debian: None });
        }
        if self.series == Series::V6_1 {
            packages::ensure_installed_for_6_1()?;
        }
        let image = kernel::build(variant)?;
        Ok(Host { name: variant.to_string(), variant, image, parameters, debian: None })
    }
}

/// What is booted.
#[derive(Debug)]
struct Host {
    name: String,
    /// What to expect of it.
    variant: Variant,
    image: PathBuf,
    /// What its kernel is told besides.
    parameters: String,
    /// Where it has modules.
    debian: Option<debian::Kernel>,
}

impl Host {
    /// Builds the programs for it, and an initramfs that runs this script.
    fn initramfs(&self, script: &str) -> Result<TempPath> {
        let programs = payload::build().context("the lab's programs")?;
        if trials::needs_linux(script) {
            payload::add_linux(&programs).context("the lab's Linux guests")?;
        }
        let contents = self.debian.as_ref().map_or_else(Contents::default, |debian| Contents {
            modules: &debian.modules,
            programs: (!debian.has_shared_folder).then_some(&programs),
        });
        initramfs::make(script, contents).context("the lab's initramfs")
    }

    fn machine<'a>(
        &'a self,
        name: &'a str,
        processors: Processors,
        initramfs: &'a Path,
        limit: Duration,
    ) -> LabMachine<'a> {
        LabMachine {
            name,
            kernel: &self.image,
            initramfs,
            processors,
            shows_everything: false,
            parameters: &self.parameters,
            limit,
        }
    }
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    if let Command::Test(test) = &arguments.command {
        trials::check(&test.filter)?;
    }
    packages::ensure_installed_for_lab()?;
    match &arguments.command {
        Command::Build(build) => {
            Output::default().line(format_args!("{}", build.host()?.image.display()))?;
            Ok(())
        }
        Command::Test(test) => {
            let limit = Duration::from_secs(test.limit * 60);
            run_tests(&test.build.host()?, &test.filter, limit)
        }
        Command::Run(run) => {
            let host = run.build.host()?;
            let initramfs = host.initramfs(&trials::script_of(&run.command.join(" ")))?;
            let processors = if run.in_turn { Processors::InTurn } else { Processors::Parallel };
            let machine = host.machine("run", processors, &initramfs, Duration::from_secs(run.limit * 60));
            let results = machine::run(&LabMachine { shows_everything: true, ..machine })?;
            match results.trials.first() {
                Some(trial) if trial.code == 0 => Ok(()),
                Some(trial) => bail!("the command ended with {}", trial.code),
                None => bail!("nothing was run in the lab; the machine's log is {}", results.log.display()),
            }
        }
        Command::Shell(build) => {
            let host = build.host()?;
            let initramfs = host.initramfs("")?;
            machine::shell(&host.machine("shell", Processors::Parallel, &initramfs, Duration::MAX))
        }
    }
}

/// Why the lab cannot be had here, after what can be installed is.
pub(crate) fn missing() -> Option<String> {
    let installed = packages::ensure_installed_for_lab().map_err(|e| format!("{e:#}"));
    installed.and_then(|()| packages::missing_for_lab().map_or(Ok(()), Err)).err()
}

/// What `cargo xtask test` runs: everything on the project's kernel, and on its stock twin what that answers otherwise.
///
/// # Errors
/// When something fails in there, or a kernel does not build.
pub(crate) fn test_both() -> Result<()> {
    for (flavour, filter) in [(Flavour::Patched, &[][..]), (Flavour::Stock, trials::ON_STOCK_TOO)] {
        let variant = Variant { series: Series::V6_12, flavour, checks: Checks::Vm };
        let (name, image) = (variant.to_string(), kernel::build(variant)?);
        let host = Host { name, variant, image, parameters: String::new(), debian: None };
        let filter: Vec<_> = filter.iter().map(ToString::to_string).collect();
        run_tests(&host, &filter, LIMIT)?;
    }
    Ok(())
}

/// Boots a kernel and runs the project's tests in it: those that need no guests, and on another machine those that do.
///
/// # Errors
/// When one fails, or a machine does not come to an end.
fn run_tests(host: &Host, filter: &[String], limit: Duration) -> Result<()> {
    let mut run = 0;
    let mut failed: Vec<String> = Vec::new();
    for load in Load::ALL {
        let Some(script) = trials::script(host.variant, load, filter) else { continue };
        let results = run_script(host, load, &script, limit)?;
        if results.trials.is_empty() {
            bail!("nothing was run in the lab; the machine's log is {}", results.log.display());
        }
        run += results.trials.len();
        for trial in results.trials.iter().filter(|trial| trial.code != 0) {
            Output::default().line(format_args!(
                "\nthe end of {}, of which {} has all:\n{}",
                trial.name,
                results.log.display(),
                results.end_of(&trial.name)
            ))?;
            failed.push(trial.name.clone());
        }
    }
    Output::default().line(format_args!("lab, {}: {run} trials, {} failed", host.name, failed.len()))?;
    if !failed.is_empty() {
        bail!("in the lab failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Runs trials on a machine for them.
fn run_script(host: &Host, load: Load, script: &str, limit: Duration) -> Result<machine::Results> {
    let (name, processors) = match load {
        Load::Programs => ("test", Processors::Parallel),
        Load::Guests => ("test-guests", Processors::InTurn),
        Load::LinuxGuests => ("test-linux", Processors::Parallel),
    };
    let boot = || {
        let initramfs = host.initramfs(script)?;
        machine::run(&host.machine(name, processors, &initramfs, limit))
    };
    match boot() {
        Err(e) if e.is::<WithoutAWord>() => {
            note(format_args!(
                "{e:#}\n\nThat was the emulator, as far as can be told: all trials run again, once, on a new machine."
            ));
            boot()
        }
        booted => booted,
    }
}
