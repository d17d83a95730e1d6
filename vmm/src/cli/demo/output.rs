//! What the demo shows at the end: pictures and a table, or one JSON object.

use std::fmt;

use memory_agent::picture;
use serde::Serialize;
use workload_guest::report::{CheckedAll, Report as GuestReport};

use crate::cli::table;
use crate::control::PagesReport;
use crate::migration::plan::ColdPolicy;
use crate::migration::progress::{PagesByClass, Report, SourceResidency};

/// One migration with what was seen before and after.
pub(super) struct Migration {
    pub(super) report: Report,
    /// Longest stall the guest saw, microseconds.
    pub(super) stall: u64,
    pub(super) before: PagesReport,
    pub(super) source_after: PagesReport,
    pub(super) destination_after: PagesReport,
}

/// Everything that is shown.
pub(super) struct Shown {
    errors: u64,
    pages_checked: u64,
    longest_stall_us: u64,
    migrations: Vec<Migration>,
}

#[derive(Serialize)]
pub(super) struct Json {
    guest: GuestJson,
    migrations: Vec<MigrationJson>,
}

#[derive(Serialize)]
struct GuestJson {
    errors: u64,
    pages_checked: u64,
    longest_stall_us: u64,
}

#[derive(Serialize)]
struct MigrationJson {
    cold_policy: ColdPolicy,
    total_ms: u64,
    downtime_us: u64,
    guest_stall_us: u64,
    rounds: u32,
    bytes_sent: u64,
    pages: PagesByClass,
    swap_ins: u64,
    swap_outs: u64,
    source: SourceResidency,
    destination: DestinationJson,
}

#[derive(Serialize)]
struct DestinationJson {
    resident: u64,
    swapped: u64,
}

impl Shown {
    pub(super) fn new(checked: &CheckedAll, report: &GuestReport, migrations: Vec<Migration>) -> Self {
        Self {
            errors: checked.errors.max(report.errors),
            pages_checked: checked.pages + report.checked,
            longest_stall_us: migrations.iter().map(|m| m.stall).max().unwrap_or(0),
            migrations,
        }
    }

    pub(super) fn json(&self) -> Json {
        let migrations = self.migrations.iter().map(|m| MigrationJson {
            cold_policy: m.report.cold_policy,
            total_ms: m.report.total_ms,
            downtime_us: m.report.downtime_us,
            guest_stall_us: m.stall,
            rounds: m.report.rounds,
            bytes_sent: m.report.bytes_sent,
            pages: m.report.pages,
            swap_ins: m.report.swap_ins,
            swap_outs: m.report.swap_outs,
            source: m.report.source,
            destination: DestinationJson {
                resident: m.destination_after.counts.resident,
                swapped: m.destination_after.counts.swapped,
            },
        });
        Json {
            guest: GuestJson {
                errors: self.errors,
                pages_checked: self.pages_checked,
                longest_stall_us: self.longest_stall_us,
            },
            migrations: migrations.collect(),
        }
    }
}

/// The policy as it is written on the command line.
pub(super) fn name(cold: ColdPolicy) -> &'static str {
    match cold {
        ColdPolicy::Paced => "paced",
        ColdPolicy::Eager => "eager",
        ColdPolicy::Lazy => "lazy",
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for m in &self.migrations {
            let policy = name(m.report.cold_policy);
            for (title, pages) in [
                ("source before", &m.before),
                ("source after", &m.source_after),
                ("destination after (before: all holes)", &m.destination_after),
            ] {
                writeln!(f, "\n--cold {policy}: {title}\n{}", picture::draw(&pages.cells).trim_end())?;
            }
        }
        writeln!(f, "{}\n", picture::LEGEND)?;
        let rows: Vec<_> =
            self.migrations.iter().map(|m| (m.report.cold_policy, m.report.clone(), Some(m.stall))).collect();
        writeln!(f, "{}", table::of_reports(&rows))?;
        writeln!(f, "the guest checked {} pages and found {} errors", self.pages_checked, self.errors)
    }
}
