//! Requests about guest RAM, which change nothing of the machine's life.

use std::time::Duration;

use memory_agent::{ByteSize, Metrics, PageOutReport, picture};

use super::error::VmmError;
use super::{MAX_CELLS, PagesReport, Status, postcopy_metrics};
use crate::devices::virtio::balloon::BalloonStatus;
use crate::machine::Machine;
use crate::ram::RamWatch;

/// What guest RAM is, in `cells` parts; with `from_agent`, as the agent saw it last.
pub(super) fn pages(machine: &Machine, cells: u32, from_agent: bool) -> Result<PagesReport, VmmError> {
    if cells > MAX_CELLS {
        return Err(VmmError::Cells(cells));
    }
    let (residency, age) = if from_agent {
        machine.ram_watch().and_then(RamWatch::map).ok_or(VmmError::NoMap)?
    } else {
        (machine.ram().residency(machine.ram().all_pages())?, Duration::ZERO)
    };
    let cells = picture::cells(&residency, cells);
    Ok(PagesReport { counts: residency.counts(), cells, age_ms: age.as_millis() as u64 })
}

/// What Prometheus wants to know.
pub(super) fn metrics(machine: &Machine, status: &Status) -> Result<String, VmmError> {
    let watch = machine.ram_watch();
    let map = watch.and_then(RamWatch::counts);
    // Without an agent's map the kernel's own sums are as good.
    let map = map.or_else(|| Some((machine.ram().counts().ok()?, Duration::ZERO)));
    let cost = watch.map(RamWatch::cost).unwrap_or_default();
    let metrics = Metrics { pid: std::process::id(), map, cost };
    let text = metrics.text().and_then(|text| {
        Ok(text + &postcopy_metrics::text(status.post_copy.as_ref(), status.post_copy_source.as_ref())?)
    });
    text.map_err(|e| VmmError::Metrics(e.to_string()))
}

/// Pages out what is resident of guest physical addresses and lengths in bytes, or of all of guest RAM.
pub(super) fn page_out(machine: &Machine, ranges: Option<&[(u64, u64)]>) -> Result<PageOutReport, VmmError> {
    let ram = machine.ram();
    let ranges = match ranges {
        None => vec![ram.all_pages()],
        Some(ranges) => ranges
            .iter()
            .map(|&(start, length)| {
                let end = start.saturating_add(length);
                ram.layout().pages_of(start..end).ok_or(VmmError::Range { start, end })
            })
            .collect::<Result<_, _>>()?,
    };
    Ok(ram.page_out(&ranges)?)
}

/// Asks the guest to give `size` of its memory, unless nothing is said, and tells what it has given.
pub(super) fn balloon(machine: &Machine, size: Option<ByteSize>) -> Result<BalloonStatus, VmmError> {
    let balloon = machine.ports().balloon.as_ref().ok_or(VmmError::NoBalloon)?;
    if let Some(asked) = size {
        let memory = ByteSize(machine.ram().layout().bytes());
        if asked > memory {
            return Err(VmmError::BalloonSize { asked, memory });
        }
        balloon.set_target(asked);
    }
    Ok(balloon.status())
}
