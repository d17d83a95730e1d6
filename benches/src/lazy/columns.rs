//! What is measured, by name.

use crate::table::Column;

const fn column(key: &'static str, heading: &'static str) -> Column {
    Column { key, heading }
}

/// All columns, in the tables' order. Residency is in pages of 4 KiB.
pub(super) const COLUMNS: &[Column] = &[
    column("switchover_ms", "switch-\nover\nms"),
    column("swap_ins_before_switchover", "swap ins\nbefore"),
    column("downtime_ms", "down-\ntime\nms"),
    column("guest_stall_us", "guest\nstall\nus"),
    column("round_trip_us", "round\ntrip\nus"),
    column("round_trip_p99_us", "p99\nus"),
    column("round_trip_apart_us", "apart\nus"),
    column("round_trip_one_cpu_us", "one\nCPU\nus"),
    column("swap_in_us", "swap\nin\nus"),
    column("swap_in_p99_us", "p99\nus"),
    column("swap_in_apart_us", "apart\nus"),
    column("touch_every_ms", "touch\nevery\nms"),
    column("touch_mean_us", "touch\nmean\nus"),
    column("touch_longest_us", "touch\nmax\nus"),
    column("faults", "pages\nwaited\nfor"),
    column("fault_p50_us", "wait\np50\nus"),
    column("fault_p99_us", "wait\np99\nus"),
    column("fault_max_us", "wait\nmax\nus"),
    column("source_resident_before", "source\nbefore"),
    column("source_resident_after", "source\nafter"),
    column("source_swapped_after", "source\nswapped\nafter"),
    column("destination_resident", "dest.\nresident"),
    column("destination_swapped", "dest.\nswapped"),
    column("exit_code", "exit\ncode"),
    column("link_ms", "memory\nonce\nms"),
    column("tail_ms", "post-copy\nms"),
    column("total_ms", "total\nms"),
    column("guest_errors", "guest\nerrors"),
];

/// What people have to know to read them.
pub(super) const LEGEND: &str = "\
switchover: until the guest runs at the destination: by Thermocline's account, from its connection on; for QEMU from the
command to the destination's RESUME. QEMU's post-copy is begun with the migration, so that nothing goes before the guest.
swap ins before: of the whole host, from the command until then. downtime: by the monitor's own account.
guest stall: the longest gap the guest saw in its own time, from before the command to after post-copy.
pages waited for, wait: by the destination's account, from the guest's fault to the page's landing. Percentiles are there
where it waited. In `touch` they are those of the guest's touching cold pages, before it checks all of its memory.
touch: by the guest's clock, over all cold pages that it touched at the destination, whether they were there or not. In a row,
each right behind the one before; `apart` each on a command of its own; `slow` is --cold-rate 1MiB, `unlimited` 0.
source before, after, swapped after; dest.: pages of guest RAM, by SEEK_DATA and mincore on the memory file. After post-copy,
while the source's process is still there (Thermocline: --stay), before the guest checks all of its memory.
post-copy: from the guest's running at the destination to the last page's confirmation. total: to both sides being done.
floor: a round trip over loopback TCP with a page in the answer, each end on a CPU of its own as on two hosts, one behind the
other and with 10 ms between them (a CPU falls asleep, and its caches are others'); the same with both ends on one CPU, which
takes a switch and wakes nobody. And reading a page of a memory file that was paged out to the same zram, in a row and apart.
Nothing else of this benchmark is at work.
memory once: what the link needs to carry all that the guest has written, once.
";
