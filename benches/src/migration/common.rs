//! What the benchmarks that migrate guests have in common: their options, and the swap that guests go to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use memory_agent::ScopedZram;

use super::{MARGIN_MIB, MIB, MOST_MIB, mostly_cold};
use crate::subject::GuestSpec;

/// Options of each of them.
#[derive(Clone, Debug, Args)]
pub(crate) struct Common {
    /// Also write what was measured to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// How often everything is measured; tables have medians.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) runs: u32,
    /// Guest memory, MiB.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub(crate) mib: u64,
    /// Which part of it is swapped out, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.75)]
    pub(crate) cold: f64,
}

impl Common {
    /// Whether there is anything to measure, and it can be.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(Path::new("/dev/kvm").exists(), "there is no /dev/kvm, and without KVM there is nothing to measure");
        ensure!(self.runs > 0, "--runs must be 1 at least");
        ensure!((0.0..=1.0).contains(&self.cold), "--cold is a share, from 0 to 1");
        let least = MARGIN_MIB * 4;
        ensure!((least..=MOST_MIB).contains(&self.mib), "--mib can be {least} to {MOST_MIB}");
        Ok(())
    }

    /// A guest that is mostly swapped out.
    pub(crate) fn mostly_cold(&self) -> GuestSpec {
        mostly_cold(self.mib, self.cold)
    }

    /// Swap for what becomes of it. It is filled first, so that what else is there for swap does not matter, as long as it
    /// stays on.
    pub(crate) fn swap(&self) -> Result<ScopedZram> {
        ScopedZram::with_priority(3 * self.mib * MIB, 32767).context("the guest's pages need swap")
    }
}
