//! How much memory there is, and for whom.

use memory_agent::{ByteSize, MemoryGroup, SwapDevice};

use super::swap::any_keeps;
use super::{Area, Findings, State};
use crate::host;
use crate::host::text;

pub(super) fn examine(found: &mut Findings, devices: &[SwapDevice]) {
    size(found);
    group(found);
    reclaim(found, devices);
}

fn size(found: &mut Findings) {
    let meminfo = text::read("/proc/meminfo").unwrap_or_default();
    let size = |name| text::kib_field(&meminfo, name).map_or("unknown".into(), |bytes| ByteSize(bytes).to_string());
    let value = format!("{}, {} available, {} of swap", size("MemTotal"), size("MemAvailable"), size("SwapTotal"));
    match host::memory_and_swap() {
        Some(most) => {
            found.add(Area::Memory, "memory", State::Ok, value, format_args!("a guest may have up to {most}"))
        }
        None => {
            let unknown = "a guest larger than this host is not refused in time";
            found.add(Area::Memory, "memory", State::Limited, value, unknown);
        }
    }
}

fn group(found: &mut Findings) {
    let Some(group) = MemoryGroup::own() else {
        found.add(Area::Memory, "control group", State::Ok, "none", "guests have the host's memory");
        return;
    };
    let total = rustix::system::sysinfo();
    let total = (total.totalram as u64).saturating_mul(u64::from(total.mem_unit));
    // "No limit" of version 1 is a number larger than any memory.
    let limit = group.limit().filter(|limit| *limit < total);
    let (value, consequence) = match limit {
        Some(limit) => (
            format!("version {}, {} at most", group.version(), ByteSize(limit)),
            "beyond it this control group's own pages are paged out, whatever the host has free",
        ),
        None => (format!("version {}, no limit of its own", group.version()), "guests have the host's memory"),
    };
    found.add(Area::Memory, "control group", State::Ok, value, consequence);
}

/// Whether the kernel can be asked to free what it has written to a disk already.
fn reclaim(found: &mut Findings, devices: &[SwapDevice]) {
    let there = MemoryGroup::own().is_some_and(|group| group.can_reclaim());
    let needed = any_keeps(devices);
    let (value, consequence) = match (there, needed) {
        (true, _) => ("there", "memory-agent page-out --reclaim has pages freed that wait in the swap cache"),
        (false, true) => ("none (cgroup 2, Linux 5.19)", "pages in the swap cache leave when the kernel needs memory"),
        (false, false) => ("none (cgroup 2, Linux 5.19)", "not needed: no swap device here keeps pages in memory"),
    };
    found.add(Area::Memory, "memory.reclaim", State::ok_or(there || !needed, State::Limited), value, consequence);
}
