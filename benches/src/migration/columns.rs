//! What is measured, by name.

use crate::table::Column;

const fn column(key: &'static str, heading: &'static str) -> Column {
    Column { key, heading }
}

/// All columns, in the table's order. Residency is in pages of 4 KiB.
pub(crate) const COLUMNS: &[Column] = &[
    column("total_ms", "total\nms"),
    column("downtime_ms", "down-\ntime\nms"),
    column("guest_stall_us", "guest\nstall\nus"),
    column("swap_ins", "swap\nins"),
    column("swap_outs", "swap\nouts"),
    column("source_resident_before", "source\nbefore"),
    column("source_resident_peak", "source\npeak"),
    column("source_resident_after", "source\nafter"),
    column("destination_resident", "dest.\nresident"),
    column("destination_swapped", "dest.\nswapped"),
    column("hot_mib_per_s", "hot\nMiB/s"),
    column("cpu_ms_source", "source\nCPU\nms"),
    column("cpu_ms_destination", "dest.\nCPU\nms"),
    column("cpu_ms_guard", "guards'\nCPU\nms"),
    column("errors", "er-\nrors"),
    column("overhead_kib", "over-\nhead\nKiB"),
    column("overhead_peak_kib_source", "source\npeak\nKiB"),
    column("overhead_peak_kib_destination", "dest.\npeak\nKiB"),
    column("exec_to_guest_ms", "exec to\nguest\nms"),
];

/// What people have to know to read them.
pub(crate) const LEGEND: &str = "\
total: from the command to both sides being done, which includes paging out at Thermocline's destination.
downtime: by the monitor's own account. guest stall: the longest gap the guest saw in its own time.
swap ins, outs: of the whole host, from the command to both sides being done.
source before, peak, after; dest.: pages of guest RAM that are resident or swapped, by SEEK_DATA and mincore on the memory
file; peak by the kernel's sums every 5 ms. Thermocline's source process has ended when `after` is counted: its file is
held open for that.
hot: MiB that were resident before, by the total time. CPU: user and system, guest included, in steps of 10 ms.
guards' CPU: of the programs that put back what the migration woke.
overhead: anonymous and file memory (RssAnon + RssFile) of the source before, and the most on each side meanwhile.
exec to guest: from exec to the guest's first instruction: the arrival of its first byte less the time that it says it
needed up to there.
";
