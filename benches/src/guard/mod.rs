//! `cargo xtask bench guard`: stock QEMU migrates a guest that is mostly swapped out, by itself and with
//! `memory-agent guard` beside it.
//!
//! | mode | what is guarded |
//! |---|---|
//! | `unguarded` | nothing |
//! | `guard` | the source |
//! | `guard-both` | the source, and the destination by the source's map |
//!
//! And a guest that is not migrated, all of whose memory somebody reads: `read` is `cat` of the memory file, `scan`
//! `memory-agent scan hash`.

mod guarded;
mod scan;

use anyhow::{Context, Result, ensure};
use clap::Args;
use command_line::Output;
use memory_agent::ScopedZram;

use crate::PROGRAM;
use crate::disturbance::Disturbances;
use crate::migration::{Before, Common, columns, measure};
use crate::peer::qemu::Qemu;
use crate::stop;
use crate::subject::Subject;
use crate::table::{Row, medians, table, write_json};
use guarded::{Guarded, MemoryAgent};
use scan::Reader;

const UNGUARDED: &str = "unguarded";
/// The modes, and whether source and destination are guarded.
const MODES: [(&str, bool, bool); 3] = [(UNGUARDED, false, false), ("guard", true, false), ("guard-both", true, true)];
/// Readers of a guest that stays.
const READ: &str = "read";
const SCAN: &str = "scan";

/// Options of `cargo xtask bench guard`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    common: Common,
    /// The guards' window, MiB.
    #[arg(long, value_name = "N", default_value_t = 16)]
    window: u64,
    /// Only this mode; may be repeated.
    #[arg(long, value_name = "MODE")]
    mode: Vec<String>,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    arguments.common.check()?;
    let names: Vec<_> = MODES.iter().map(|(name, ..)| *name).chain([READ, SCAN]).collect();
    let known = arguments.mode.iter().all(|mode| names.contains(&mode.as_str()));
    ensure!(known, "--mode can be {}", names.join(", "));
    let (qemu, agent) = (Qemu::find()?, MemoryAgent::find()?);
    let zram = arguments.common.swap()?;
    let rows = measure_all(arguments, &qemu, &agent, &zram);
    // Every process that had pages there is gone.
    let closed = zram.close();
    let (rows, disturbances) = rows?;
    let rows = medians(&rows);
    closed?;
    let mut output = Output::default();
    output.line(table(columns::COLUMNS, &rows, |row, other| {
        let peer = if [READ, SCAN].contains(&row.mode.as_str()) { READ } else { UNGUARDED };
        other.mode == peer
    }))?;
    output.line(columns::LEGEND.trim_end())?;
    output.line(format_args!(
        "Medians of {} runs, window {} MiB; × is the ratio to {UNGUARDED}, or to {READ}.",
        arguments.common.runs, arguments.window
    ))?;
    output.line(format_args!("total goes on until the guards have restored what they can. {}", qemu.version()))?;
    for sentence in disturbances.sentences() {
        output.line(sentence)?;
    }
    match &arguments.common.json {
        Some(path) => write_json(path, columns::COLUMNS, &rows),
        None => Ok(()),
    }
}

fn measure_all(
    arguments: &Arguments,
    qemu: &Qemu,
    agent: &MemoryAgent,
    zram: &ScopedZram,
) -> Result<(Vec<Row>, Disturbances)> {
    let machine = arguments.common.mostly_cold();
    let (mut rows, mut disturbances) = (Vec::new(), Disturbances::default());
    for run in 1..=arguments.common.runs {
        let wanted = |mode: &str| arguments.mode.is_empty() || arguments.mode.iter().any(|wanted| wanted == mode);
        for (mode, guarded, both) in MODES.into_iter().filter(|(mode, ..)| wanted(mode)) {
            stop::check()?;
            let folder = tempfile::Builder::new().prefix("thermocline-bench-").tempdir()?;
            let path = folder.path().to_owned();
            let subject =
                Guarded { subject: qemu, agent: agent.clone(), window_mib: arguments.window, both, folder: path };
            let subject: &dyn Subject = if guarded { &subject } else { qemu };
            let what = || format!("{mode}, run {run}");
            let values = measure(subject, &machine, Before::PageOut, folder.path()).with_context(what)?;
            PROGRAM.say(format_args!("{} of {}: {:.0} ms", what(), arguments.common.runs, values["total_ms"]));
            rows.push(Row { subject: subject.name().to_owned(), mode: mode.to_owned(), values });
            disturbances.look(&zram.path());
        }
        for (mode, reader) in [(READ, Reader::Cat), (SCAN, Reader::Scan(agent, arguments.window))] {
            if wanted(mode) {
                stop::check()?;
                let folder = tempfile::Builder::new().prefix("thermocline-bench-").tempdir()?;
                let what = || format!("{mode}, run {run}");
                let values = scan::measure(qemu, &machine, &reader, folder.path()).with_context(what)?;
                PROGRAM.say(format_args!("{} of {}: {:.0} ms", what(), arguments.common.runs, values["total_ms"]));
                rows.push(Row { subject: qemu.name().to_owned(), mode: mode.to_owned(), values });
            }
        }
    }
    Ok((rows, disturbances))
}
