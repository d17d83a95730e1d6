//! `cargo xtask bench probe`: what it costs to ask what pages are, in nanoseconds a page, for each probe and pattern.
//!
//! | subject | what it is |
//! |---|---|
//! | `page-cache` | the exact probe |
//! | `page-cache-calls` | its system calls on that range, alone |
//! | `page-cache-by-seek` | the exact probe as kernels before 6.5 allow it |
//! | `counts` | how many pages are in each state, without which (`counts_of`) |
//! | `marker`, `uffd-marker` | the hint alone |
//! | `marker+exact`, `uffd-marker+exact` | the hint with the exact probe asked about what it leaves open |
//!
//! Subjects take turns on the same memory, which is looked at before and after: asking must not change it.

mod calls;
mod memory;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use command_line::Output;
use memory_agent::{
    HintProbe, KernelOffer, Marker, PageCache, PageCacheBySeek, PageRange, Probe, ProbeKind, Residency, ScopedZram,
    SwapCounters, counts_of,
};

use crate::PROGRAM;
use crate::disturbance::Disturbances;
use crate::stop;
use crate::table::{Column, Row, medians, table, write_json};
use calls::Calls;
use memory::{Memory, Pattern};

const PAGES_A_GIB: u64 = 1 << 18;
/// Pages in a TiB.
const PAGES_A_TIB: f64 = (1_u64 << 28) as f64;
/// The subject that others are compared with.
const PEER: &str = "page-cache-calls";

const COLUMNS: &[Column] = &[
    Column { key: "ns_per_page", heading: "ns a\npage" },
    Column { key: "tib_s", heading: "1 TiB\ns" },
    Column { key: "calls", heading: "system\ncalls" },
    Column { key: "map_kib", heading: "map\nKiB" },
    Column { key: "open_pages", heading: "open\npages" },
    Column { key: "swap_ins", heading: "swap\nins" },
    Column { key: "allocated", heading: "pages\nallocated" },
    Column { key: "changed", heading: "pages\nchanged" },
];

const LEGEND: &str = "\
ns a page: CPU and wall time are the same here, nothing waits. 1 TiB: the same, for 2^28 pages. open: pages of which a hint knows
nothing. swap ins: of the whole host while a subject was at work. allocated, changed: holes that got pages, and pages that changed
their state, by the exact probe before and after.";

/// Options of `cargo xtask bench probe`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Also write the table to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each subject is measured; the table has medians.
    #[arg(long, value_name = "N", default_value_t = 7)]
    runs: u32,
    /// Memory, GiB; may be repeated.
    #[arg(long, value_name = "N", default_values_t = [1, 8])]
    gib: Vec<u64>,
    /// Only this pattern; may be repeated.
    #[arg(long, value_name = "PATTERN", value_enum)]
    mode: Vec<Pattern>,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.runs > 0, "--runs must be 1 at least");
    ensure!(arguments.gib.iter().all(|gib| (1..=64).contains(gib)), "--gib can be 1 to 64");
    let most = arguments.gib.iter().copied().max().unwrap_or(1);
    let zram = ScopedZram::with_priority((most * 3 / 2) << 30, 32767).context("the pages need swap")?;
    let rows = measure_all(arguments, &zram);
    let closed = zram.close();
    let (rows, disturbances) = rows?;
    let rows = medians(&rows);
    closed?;
    let mut output = Output::default();
    output.line(table(COLUMNS, &rows, |row, other| other.subject == PEER && other.mode == row.mode))?;
    output.line(LEGEND)?;
    output.line(format_args!("Medians of {} runs; × is the ratio to {PEER}.", arguments.runs))?;
    for kind in [ProbeKind::Marker, ProbeKind::UffdMarker] {
        if let Some(why) = KernelOffer::of_this_host().why_not(kind) {
            output.line(format_args!("{kind} is not measured: {why}."))?;
        }
    }
    for sentence in disturbances.sentences() {
        output.line(sentence)?;
    }
    match &arguments.json {
        Some(path) => write_json(path, COLUMNS, &rows),
        None => Ok(()),
    }
}

fn measure_all(arguments: &Arguments, zram: &ScopedZram) -> Result<(Vec<Row>, Disturbances)> {
    let (mut rows, mut disturbances) = (Vec::new(), Disturbances::default());
    for gib in &arguments.gib {
        for pattern in Pattern::ALL.into_iter().filter(|p| arguments.mode.is_empty() || arguments.mode.contains(p)) {
            stop::check()?;
            let mode = format!("{}, {gib} GiB", pattern.name());
            PROGRAM.say(format_args!("{mode}"));
            let plain = Memory::new(gib * PAGES_A_GIB, pattern, false)?;
            turns(arguments.runs, &mode, &plain, &mut rows)?;
            drop(plain);
            if KernelOffer::of_this_host().why_not(ProbeKind::UffdMarker).is_none() {
                let armed = Memory::new(gib * PAGES_A_GIB, pattern, true)?;
                hint_turns(arguments.runs, &mode, &armed, &mut rows)?;
            }
            disturbances.look(&zram.path());
        }
    }
    Ok((rows, disturbances))
}

/// Memory that nobody has prepared.
fn turns(runs: u32, mode: &str, memory: &Memory, rows: &mut Vec<Row>) -> Result<()> {
    let mapping = memory.mapping()?;
    let all = 0..memory.pages;
    let calls = Calls::of(&memory.truth);
    let with_markers = KernelOffer::of_this_host().markers == Some(true);
    for _ in 0..runs {
        let mut row = measured(memory, "page-cache", mode, || Ok(PageCache.residency(&mapping, all.clone())?))?;
        row.values.insert("calls", calls.count() as f64);
        rows.push(row);
        let mut row = measured(memory, PEER, mode, || calls.make(&mapping).map(|()| Residency::default()))?;
        row.values.insert("calls", calls.count() as f64);
        row.values.remove("map_kib");
        rows.push(row);
        rows.push(measured(memory, "page-cache-by-seek", mode, || {
            Ok(PageCacheBySeek.residency(&mapping, all.clone())?)
        })?);
        let mut row = measured(memory, "counts", mode, || {
            black_box(counts_of(&mapping)?);
            Ok(Residency::default())
        })?;
        row.values.remove("map_kib");
        rows.push(row);
        if with_markers {
            hints(memory, "marker", mode, &Marker, rows)?;
        }
    }
    Ok(())
}

/// Memory whose pages leave markers by asynchronous write protection.
fn hint_turns(runs: u32, mode: &str, memory: &Memory, rows: &mut Vec<Row>) -> Result<()> {
    let armed = memory.armed.as_ref().context("the memory is not armed")?;
    (0..runs).try_for_each(|_| hints(memory, "uffd-marker", mode, armed, rows))
}

fn hints(memory: &Memory, name: &str, mode: &str, probe: &dyn HintProbe, rows: &mut Vec<Row>) -> Result<()> {
    let mapping = memory.mapping()?;
    let all = 0..memory.pages;
    let open = probe.hint(&mapping, all.clone())?.counts().hole;
    let mut row = measured(memory, name, mode, || {
        // What it believes, as a map: nothing is asked about what it leaves open.
        let hint = probe.hint(&mapping, all.clone())?;
        black_box(&hint);
        Ok(Residency::default())
    })?;
    row.values.insert("open_pages", open as f64);
    row.values.remove("map_kib");
    rows.push(row);
    rows.push(measured(memory, &format!("{name}+exact"), mode, || {
        Ok(probe.hint(&mapping, all.clone())?.resolve(&mapping, &PageCache)?)
    })?);
    Ok(())
}

/// One turn of one subject, looked at from outside.
fn measured(memory: &Memory, subject: &str, mode: &str, ask: impl Fn() -> Result<Residency>) -> Result<Row> {
    stop::check()?;
    let (allocated, swap) = (memory.allocated()?, SwapCounters::read()?);
    let start = Instant::now();
    let map = black_box(ask()?);
    let elapsed = start.elapsed();
    let swap = SwapCounters::read()?.since(&swap);
    let ns = elapsed.as_nanos() as f64 / memory.pages as f64;
    let now = PageCache.residency(&memory.mapping()?, 0..memory.pages)?;
    let changed: u64 = memory.truth.ranges_where(&now, |a, b| a != b).map(|range| range.page_count()).sum();
    let values = BTreeMap::from([
        ("ns_per_page", ns),
        ("tib_s", ns * PAGES_A_TIB / 1e9),
        ("map_kib", map.heap_bytes() as f64 / 1024.0),
        ("swap_ins", swap.swap_ins as f64),
        ("allocated", memory.allocated()?.saturating_sub(allocated) as f64),
        ("changed", changed as f64),
    ]);
    Ok(Row { subject: subject.to_owned(), mode: mode.to_owned(), values })
}
