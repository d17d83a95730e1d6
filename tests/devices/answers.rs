//! Lines by which the guest answers, of one kind each.

use anyhow::{Result, ensure};
use thermocline_tests::Machine;
use workload_guest::Line;
use workload_guest::device_report::{DiskDone, Free, NetDone};

pub(crate) fn disk_done(line: Line) -> Option<DiskDone> {
    if let Line::DiskDone(done) = line { Some(done) } else { None }
}

pub(crate) fn net_done(line: Line) -> Option<NetDone> {
    if let Line::NetDone(done) = line { Some(done) } else { None }
}

pub(crate) fn free(line: Line) -> Option<Free> {
    if let Line::Free(free) = line { Some(free) } else { None }
}

/// Has the disk do something, of which nothing may fail.
pub(crate) fn disk(machine: &mut Machine, command: &str) -> Result<DiskDone> {
    let done = machine.console.device(command, disk_done)?;
    ensure!(done.errors + done.bad + done.repeated == 0, "{command}: {done:?}");
    Ok(done)
}
