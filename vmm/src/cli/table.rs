//! Tables of migrations for people.

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use memory_agent::ByteSize;

use crate::migration::downtime::{Downtime, Side, SideStep};
use crate::migration::plan::ColdPolicy;
use crate::migration::progress::Report;
use crate::stopwatch::Work;

/// A migration, and the longest stall the guest saw meanwhile, in microseconds, if it can tell.
pub(super) type Row = (ColdPolicy, Report, Option<u64>);

/// Steps that took less are told together.
const SHORT_US: u64 = 20;

/// Where a downtime went, a row a step.
pub(super) fn of_downtime(downtime: &Downtime) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY);
    table.set_header(["downtime", "step", "of", ""]);
    let ms = |us: u64| format!("{:.2} ms", us as f64 / 1000.0);
    let (long, short): (Vec<_>, Vec<_>) = downtime.steps.iter().partition(|step| step.step.us >= SHORT_US);
    for SideStep { side, step } in long {
        table.add_row([side_name(*side), work_name(step.work), step.part.as_str(), &ms(step.us)]);
    }
    let rest: u64 = short.iter().map(|step| step.step.us).sum();
    table.add_row(["", &format!("{} shorter steps", short.len()), "", &ms(rest)]);
    table.add_row(["", "all", "", &ms(downtime.us)]);
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Between => "between",
        Side::Destination => "destination",
    }
}

fn work_name(work: Work) -> &'static str {
    match work {
        Work::Stop => "stop",
        Work::LastRound => "send the last pages",
        Work::Save => "save",
        Work::Transfer => "transfer",
        Work::Land => "land the last pages",
        Work::Restore => "restore",
        Work::Resume => "resume",
    }
}

/// One column a migration.
pub(super) fn of_reports(reports: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY);
    let name = |cold: &ColdPolicy| format!("--cold {}", format!("{cold:?}").to_lowercase());
    table.set_header(std::iter::once("pages of 4 KiB".into()).chain(reports.iter().map(|(cold, ..)| name(cold))));
    let mut row = |title: &str, value: &dyn Fn(&Row) -> String| {
        table.add_row(std::iter::once(title.to_owned()).chain(reports.iter().map(value)));
    };
    let ms = |us: u64| format!("{:.1} ms", us as f64 / 1000.0);
    row("source resident, before", &|(_, r, _)| r.source.resident_before.to_string());
    row("source resident, peak", &|(_, r, _)| r.source.resident_peak.to_string());
    row("source resident, after", &|(_, r, _)| r.source.resident_after.to_string());
    row("source swapped, before", &|(_, r, _)| r.source.swapped_before.to_string());
    row("source swapped, after", &|(_, r, _)| r.source.swapped_after.to_string());
    let there = |count: Option<u64>| count.map_or("not told".into(), |count| count.to_string());
    row("destination resident", &|(_, r, _)| there(r.destination.map(|d| d.resident)));
    row("destination swapped", &|(_, r, _)| there(r.destination.map(|d| d.swapped)));
    row("swapped in / out on the host", &|(_, r, _)| format!("{} / {}", r.swap_ins, r.swap_outs));
    row("holes", &|(_, r, _)| r.pages.hole.to_string());
    row("zero", &|(_, r, _)| r.pages.zero.to_string());
    row("hot", &|(_, r, _)| r.pages.hot.to_string());
    row("cold", &|(_, r, _)| r.pages.cold.to_string());
    row("sent again", &|(_, r, _)| r.resent.to_string());
    row("rounds", &|(_, r, _)| r.rounds.to_string());
    row("bytes sent", &|(_, r, _)| ByteSize(r.bytes_sent).to_string());
    row("total time", &|(_, r, _)| format!("{} ms", r.total_ms));
    row("downtime, by the monitor", &|(_, r, _)| ms(r.downtime_us));
    if reports.iter().any(|(_, _, stall)| stall.is_some()) {
        row("longest stall, by the guest", &|(_, _, stall)| stall.map_or(String::new(), ms));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
