//! `cargo xtask bench lazy`: one guest, most of it swapped out, that is switched over at once and has its memory sent by post-copy, beside
//! migrations that carry its memory first.
//!
//! | part | the guest | what it shows |
//! |---|---|---|
//! | `move` | works on its warm pages | how soon it runs at the destination, what that swaps in, what is left where |
//! | [`touch`] | also touches cold pages at the destination | how long it waits for one, beside what that takes at least |
//! | [`rewrite`] | writes faster than the connection carries | that it moves all the same |
//!
//! Subjects take turns, so that what disturbs the host for a while disturbs all of them. What is measured is then held
//! against targets ([`targets`]).

mod columns;
mod floor;
mod rewrite;
mod targets;
mod touch;
mod verdict;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;
use command_line::Output;
use serde_json::{Value, json};

use crate::PROGRAM;
use crate::disturbance::Disturbances;
use crate::migration::{Before, Common, measure};
use crate::peer::qemu::Qemu;
use crate::peer::qmp::Refused;
use crate::stop;
use crate::subject::thermocline::Thermocline;
use crate::subject::{GuestSpec, Subject};
use crate::table::{Row, json, medians, table};
use verdict::Verdict;

/// The part with all subjects.
const MOVE: &str = "move";
/// Subjects that targets are about.
const LAZY: [&str; 2] = ["thermocline-lazy", "thermocline-lazy-unlimited"];
const EAGER: &str = "thermocline-eager";

/// Options of `cargo xtask bench lazy`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Only this part (`move`, `touch`, `rewrite`); may be repeated.
    #[arg(long, value_name = "MODE", value_parser = [MOVE, touch::MODE, rewrite::MODE])]
    mode: Vec<String>,
    /// Only subjects whose name contains this.
    #[arg(long, value_name = "NAME", default_value = "")]
    subject: String,
}

/// What was measured, and what came in between.
#[derive(Default)]
struct Findings {
    rows: Vec<Row>,
    /// Subjects that cannot be measured here, and why.
    refused: Vec<(String, String)>,
    disturbances: Disturbances,
}

impl Findings {
    /// Takes a row, or notes that the subject cannot be measured here.
    fn add(&mut self, subject: &str, run: u32, measured: Result<Row>) -> Result<()> {
        match measured {
            Ok(row) => {
                let keys = ["total_ms", "fault_p50_us", "touch_mean_us", "exit_code", "round_trip_us"];
                let shown = keys.iter().find_map(|key| Some(format!("{key} {:.0}", row.values.get(key)?)));
                PROGRAM.say(format_args!("{} of {}, run {run}: {}", row.mode, row.subject, shown.unwrap_or_default()));
                self.rows.push(row);
                Ok(())
            }
            Err(e) => match e.downcast_ref::<Refused>() {
                Some(refused) => {
                    PROGRAM.say(format_args!("{subject}, run {run}: {refused}"));
                    self.refused.push((subject.to_owned(), refused.to_string()));
                    Ok(())
                }
                None => Err(e.context(format!("{subject}, run {run}"))),
            },
        }
    }

    fn is_refused(&self, subject: &str) -> bool {
        self.refused.iter().any(|(refused, _)| refused == subject)
    }
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    arguments.common.check()?;
    let qemu = Qemu::find()?;
    let others = others()?;
    let zram = arguments.common.swap()?;
    let found = measure_all(arguments, &qemu, &zram.path());
    // Every process that had pages there is gone.
    let closed = zram.close();
    let found = found?;
    closed?;
    let rows = medians(&found.rows);
    let verdicts = targets::all(&rows, qemu.name());
    let mut output = Output::default();
    for mode in [MOVE, touch::MODE, rewrite::MODE] {
        let of_mode: Vec<_> = rows.iter().filter(|row| row.mode == mode).cloned().collect();
        if !of_mode.is_empty() {
            output.line(table(columns::COLUMNS, &of_mode, |_, other| other.subject == qemu.name()))?;
        }
    }
    output.line(columns::LEGEND.trim_end())?;
    output.line(format_args!("Medians of {} runs; × is the ratio to {}.", arguments.common.runs, qemu.version()))?;
    for (subject, why) in &found.refused {
        output.line(format_args!("{subject} is not measured: {why}"))?;
    }
    for sentence in found.disturbances.sentences() {
        output.line(sentence)?;
    }
    output.line(&others)?;
    for verdict in &verdicts {
        output.line(format_args!("{verdict}"))?;
    }
    match &arguments.common.json {
        Some(path) => write_lines(path, &found, &[&others], &rows, &verdicts),
        None => Ok(()),
    }
}

/// Rows, subjects that are not measured, what disturbed, and verdicts, each an object on a line of its own.
fn write_lines(path: &Path, found: &Findings, others: &[&str], rows: &[Row], verdicts: &[Verdict]) -> Result<()> {
    let mut objects: Vec<Value> = json(columns::COLUMNS, rows).as_array().cloned().unwrap_or_default();
    objects.extend(found.refused.iter().map(|(subject, why)| json!({ "subject": subject, "not_measured": why })));
    objects.extend(
        found.disturbances.sentences().chain(others.iter().copied()).map(|sentence| json!({ "disturbance": sentence })),
    );
    objects.extend(verdicts.iter().map(Verdict::json));
    let text: String = objects.iter().map(|object| format!("{object}\n")).collect();
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// All rows, and what disturbed them; `own` is the swap device of this benchmark.
fn measure_all(arguments: &Arguments, qemu: &Qemu, own: &Path) -> Result<Findings> {
    let lazy = |name: &str, more: &[&'static str]| anyhow::Ok(Thermocline::find("lazy")?.with(name, more));
    let (limited, unlimited) = (lazy(LAZY[0], &["--stay"])?, lazy(LAZY[1], &["--stay", "--cold-rate", "0"])?);
    let paced = Thermocline::find("paced")?.with("thermocline-paced", &["--stay"]);
    let eager = Thermocline::find("eager")?.with(EAGER, &["--stay"]);
    let post_copy = qemu.post_copy();
    let subjects: [&dyn Subject; 6] = [&limited, &unlimited, &paced, &eager, qemu, &post_copy];
    let machine = arguments.common.mostly_cold();
    let wanted = |mode: &str| arguments.mode.is_empty() || arguments.mode.iter().any(|wanted| wanted == mode);
    let is_wanted = |subject: &dyn Subject| subject.name().contains(&arguments.subject);
    let mut found = Findings::default();
    for run in 1..=arguments.common.runs {
        for subject in subjects.into_iter().filter(|subject| wanted(MOVE) && is_wanted(*subject)) {
            stop::check()?;
            if !found.is_refused(subject.name()) {
                found.add(subject.name(), run, move_once(subject, &machine))?;
                found.disturbances.look(own);
            }
        }
        if wanted(touch::MODE) {
            found.add(floor::SUBJECT, run, floor::measure())?;
            for subject in touch::subjects(qemu)?.iter().map(AsRef::as_ref).filter(|subject| is_wanted(*subject)) {
                stop::check()?;
                if !found.is_refused(subject.name()) {
                    found.add(subject.name(), run, touch::measure(subject, &machine))?;
                    found.disturbances.look(own);
                }
            }
        }
        if wanted(rewrite::MODE) {
            for subject in rewrite::subjects()?.iter().filter(|subject| is_wanted(*subject)) {
                found.add(subject.name(), run, rewrite::measure(subject))?;
            }
        }
    }
    Ok(found)
}

/// What else wanted the CPUs before this benchmark began.
fn others() -> Result<String> {
    let text = fs::read_to_string("/proc/loadavg").context("/proc/loadavg")?;
    let load = text.split(' ').next().unwrap_or_default();
    let cpus = std::thread::available_parallelism().context("the number of CPUs")?;
    Ok(format!("Over the minute before this began, {load} programs wanted one of {cpus} CPUs."))
}

fn move_once(subject: &dyn Subject, machine: &GuestSpec) -> Result<Row> {
    let folder = tempfile::Builder::new().prefix("thermocline-bench-").tempdir()?;
    let mut values = measure(subject, machine, Before::PageOut, folder.path())?;
    let errors = values.get("errors").copied().unwrap_or_default();
    values.insert("guest_errors", errors);
    Ok(Row { subject: subject.name().to_owned(), mode: MOVE.to_owned(), values })
}
