//! `cargo xtask bench cold`: one guest, migrated over loopback TCP by Thermocline and by stock QEMU, counted from outside
//! in the same way for each.
//!
//! | mode | the guest | what it shows |
//! |---|---|---|
//! | `cold` | most of its pages swapped out, the others worked on | what a migration swaps in, and what that takes |
//! | `hot` | three quarters written, resident, at rest | how fast resident memory travels |
//! | `idle` | 32 MiB written, at rest | how long the guest is paused |
//! | `start` | boots and is not migrated | how soon it runs, what its monitor occupies |
//!
//! Subjects take turns, so that what disturbs the host for a while disturbs all of them.

mod start;

use std::path::Path;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use command_line::Output;
use memory_agent::PAGE_SIZE;
use workload_guest::Options;

use crate::PROGRAM;
use crate::disturbance::Disturbances;
use crate::migration::{self, Before, Common, MIB, columns};
use crate::peer::qemu::Qemu;
use crate::stop;
use crate::subject::thermocline::Thermocline;
use crate::subject::{GuestSpec, Subject};
use crate::table::{Row, medians, table, write_json};

/// Options of `cargo xtask bench cold`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Only this mode; may be repeated.
    #[arg(long, value_name = "MODE", value_enum)]
    mode: Vec<Mode>,
    /// Only subjects whose name contains this.
    #[arg(long, value_name = "NAME", default_value = "")]
    subject: String,
}

/// What a guest is like when it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Mostly swapped out, and at work.
    Cold,
    /// Resident, at rest.
    Hot,
    /// Almost empty, at rest.
    Idle,
    /// Booting.
    Start,
}

impl Mode {
    const ALL: [Self; 4] = [Self::Cold, Self::Hot, Self::Idle, Self::Start];

    fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Hot => "hot",
            Self::Idle => "idle",
            Self::Start => "start",
        }
    }

    /// The machine for this mode.
    fn machine(self, arguments: &Arguments) -> GuestSpec {
        let mib = arguments.common.mib;
        let part = |share: f64| (mib as f64 * share) as u64;
        let workload = match self {
            Self::Cold => return arguments.common.mostly_cold(),
            Self::Hot => Options { working_set: MIB, cold: part(0.75) * MIB, ..Options::default() },
            Self::Idle => Options { working_set: 32 * MIB, ..Options::default() },
            Self::Start => Options { working_set: 4096, rate: 1, ..Options::default() },
        };
        GuestSpec { mib, workload }
    }

    fn measure(self, subject: &dyn Subject, machine: &GuestSpec, folder: &Path) -> Result<Row> {
        let mut values = match self {
            Self::Start => start::measure(subject, machine, folder)?,
            Self::Cold => migration::measure(subject, machine, Before::PageOut, folder)?,
            Self::Hot | Self::Idle => migration::measure(subject, machine, Before::Rest, folder)?,
        };
        if self == Self::Hot {
            let mib = values["source_resident_before"] * PAGE_SIZE as f64 / MIB as f64;
            values.insert("hot_mib_per_s", mib / values["total_ms"] * 1000.0);
        }
        Ok(Row { subject: subject.name().to_owned(), mode: self.name().to_owned(), values })
    }
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    arguments.common.check()?;
    let qemu = Qemu::find()?;
    let (paced, eager) = (Thermocline::find("paced")?, Thermocline::find("eager")?);
    let subjects = |mode| -> Vec<&dyn Subject> {
        match mode {
            Mode::Cold => vec![&paced, &eager, &qemu],
            Mode::Hot => vec![&eager, &qemu],
            Mode::Idle | Mode::Start => vec![&paced, &qemu],
        }
    };
    let wanted = |mode: &Mode| arguments.mode.is_empty() || arguments.mode.contains(mode);
    let plan: Vec<_> = Mode::ALL.into_iter().filter(wanted).map(|mode| (mode, subjects(mode))).collect();

    let zram = arguments.common.swap()?;
    let rows = measure_all(arguments, &plan, &zram.path());
    // Every process that had pages there is gone.
    let closed = zram.close();
    let (rows, disturbances) = rows?;
    let rows = medians(&rows);
    closed?;
    let mut output = Output::default();
    output.line(table(columns::COLUMNS, &rows, |row, other| other.subject == qemu.name() && other.mode == row.mode))?;
    output.line(columns::LEGEND.trim_end())?;
    output.line(format_args!("Medians of {} runs; × is the ratio to {}.", arguments.common.runs, qemu.version()))?;
    for sentence in disturbances.sentences() {
        output.line(sentence)?;
    }
    match &arguments.common.json {
        Some(path) => write_json(path, columns::COLUMNS, &rows),
        None => Ok(()),
    }
}

/// All rows, and what disturbed them; `own` is the swap device of this benchmark.
fn measure_all(
    arguments: &Arguments,
    plan: &[(Mode, Vec<&dyn Subject>)],
    own: &Path,
) -> Result<(Vec<Row>, Disturbances)> {
    let (mut rows, mut disturbances) = (Vec::new(), Disturbances::default());
    for run in 1..=arguments.common.runs {
        for (mode, subjects) in plan {
            let machine = mode.machine(arguments);
            for subject in subjects.iter().filter(|subject| subject.name().contains(&arguments.subject)) {
                stop::check()?;
                let folder = tempfile::Builder::new().prefix("thermocline-bench-").tempdir()?;
                let what = || format!("{} of {}, run {run}", mode.name(), subject.name());
                let row = mode.measure(*subject, &machine, folder.path()).with_context(what)?;
                let shown = ["total_ms", "exec_to_guest_ms"].iter().find_map(|key| row.values.get(key));
                PROGRAM.say(format_args!(
                    "{} of {}: {:.0} ms",
                    what(),
                    arguments.common.runs,
                    shown.copied().unwrap_or_default()
                ));
                rows.push(row);
                disturbances.look(own);
            }
        }
    }
    Ok((rows, disturbances))
}

#[cfg(test)]
mod tests {
    use workload_guest::{Extent, Layout};

    use super::*;
    use crate::migration::MOST_MIB;

    #[test]
    fn every_guest_fits_its_machine() {
        for mib in [64, 1024, MOST_MIB] {
            for cold in [0.0, 0.75, 1.0] {
                let arguments = Arguments {
                    common: Common { json: None, runs: 1, mib, cold },
                    mode: vec![],
                    subject: String::new(),
                };
                for mode in Mode::ALL {
                    let machine = mode.machine(&arguments);
                    // Firmware keeps its tables in the last MiB.
                    let ram = [Extent { start: MIB, len: (mib - 2) * MIB }];
                    assert!(Layout::place(&ram, &machine.workload).is_ok(), "{mode:?} with {mib} MiB, {cold}");
                }
            }
        }
    }
}
