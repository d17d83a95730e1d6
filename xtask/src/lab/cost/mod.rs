//! `cargo xtask bench kernel`: what the project's kernel patches cost in instructions, and how right the answers are that
//! they give.
//!
//! The same program (`host-kernel/selftests/pm_swap_cost.c`) runs on the kernel with and without the patches, in a machine
//! whose time stamp counter counts instructions: a figure does not depend on the host, nor on what else that does. Not
//! counted is how long an instruction takes, so cache misses are not seen. Each round of a string instruction counts as one.

mod figures;
mod judgement;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use command_line::Output;

use self::figures::Figures;
use self::report::Report;
use super::initramfs::{self, Contents};
use super::kernel::{self, Checks, Flavour, Series, Variant};
use super::machine::{self, LabMachine, Processors};
use super::payload;
use crate::packages;

/// Swap is on zram: what it costs is not hidden behind a disk's driver.
const SCRIPT: &str = "cd /lab
echo 512M > /sys/block/zram0/disksize && mkswap /dev/zram0 > /dev/null && swapon /dev/zram0 || echo 'LAB-PROBLEM no swap'
failed=0
for mode in cost accuracy; do
    echo \"LAB-BEGIN kernel $mode\"
    ./pm_swap_cost --$mode 2>&1
    code=$?
    [ $code = 0 ] || failed=1
    echo \"LAB-END $code kernel $mode\"
done
exit $failed
";
/// How long a machine may take. One took two to three minutes on a host of two processors that had other work too.
const LIMIT: Duration = Duration::from_secs(45 * 60);

/// Options of `cargo xtask bench kernel`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Write the figures to this file too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each kernel is booted.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Boot this image in place of building the kernel without patches.
    #[arg(long, value_name = "FILE")]
    stock_kernel: Option<PathBuf>,
    /// Boot this image in place of building the kernel with patches.
    #[arg(long, value_name = "FILE")]
    patched_kernel: Option<PathBuf>,
}

/// Measures.
///
/// # Errors
/// When a kernel does not build or its machine does not come to an end. Not when a target is missed.
pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    packages::ensure_installed_for_lab()?;
    let image = |given: &Option<PathBuf>, flavour| {
        let variant = Variant { series: Series::V6_12, flavour, checks: Checks::None };
        given.clone().map_or_else(|| kernel::build(variant), Ok)
    };
    let patched = image(&arguments.patched_kernel, Flavour::Patched)?;
    let stock = image(&arguments.stock_kernel, Flavour::Stock)?;
    payload::build_selftests().context("the lab's programs")?;
    let mut report = Report::default();
    for _ in 0..arguments.runs {
        report.stock.take(boot("cost-stock", &stock)?);
        report.patched.take(boot("cost-patched", &patched)?);
    }
    Output::default().line(format_args!("\n{report}"))?;
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report.json(&stock, &patched))?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// What one boot came to.
fn boot(name: &str, kernel: &Path) -> Result<Figures> {
    let initramfs = initramfs::make(SCRIPT, Contents::default()).context("the lab's initramfs")?;
    let results = machine::run(&LabMachine {
        name,
        kernel,
        initramfs: &initramfs,
        processors: Processors::Counting,
        shows_everything: false,
        parameters: "",
        limit: LIMIT,
    })?;
    let log = fs::read_to_string(&results.log)?;
    if let Some(why) = log.lines().find_map(|line| line.strip_prefix("Bail out! ")) {
        bail!("nothing was measured on {}: {why}", kernel.display());
    }
    let is_whole = results.trials.len() == 2 && results.trials.iter().all(|trial| trial.code == 0);
    ensure!(is_whole, "the measurement did not come to its end; the machine's log is {}", results.log.display());
    Figures::parse(&log).with_context(|| results.log.display().to_string())
}
