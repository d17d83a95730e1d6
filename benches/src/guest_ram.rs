//! The memory of a guest, seen from outside its monitor and in the same way whoever that is.

use std::fs::read_to_string;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memory_agent::{Counts, FileView, PAGE_SIZE, PageCache, PageState, Probe, counts_of};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use workload_guest::Extents;

use crate::{stop, sys};

/// How often pages that stay are asked for.
const ATTEMPTS: usize = 50;
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(5);

/// The one memory file of a machine without memory above the 32-bit hole: offsets are guest physical addresses.
///
/// It is kept open, so that it can be counted also after its process has ended; drop it to let it go.
#[derive(Debug)]
pub(crate) struct GuestRam {
    view: FileView,
    process: OwnedFd,
    /// Where the monitor has mapped its first byte.
    address: usize,
}

impl GuestRam {
    /// The memory file of process `pid` whose name contains `name`, and has `bytes`.
    pub(crate) fn open(pid: u32, name: &str, bytes: u64) -> Result<Self> {
        let view = FileView::of_process(pid, name)?;
        let length = view.mapping().length();
        ensure!(length == bytes, "the guest's memory file has {length} bytes instead of {bytes}");
        let maps = read_to_string(format!("/proc/{pid}/maps")).context("the monitor's mappings")?;
        let address = address_of(&maps, name, bytes).context("the monitor has not mapped the guest's memory")?;
        let number = Pid::from_raw(pid.cast_signed()).context("no process")?;
        let process = pidfd_open(number, PidfdFlags::empty()).context("pidfd_open")?;
        Ok(Self { view, process, address })
    }

    /// How many pages are in each state, looked at one by one (`SEEK_DATA` and `mincore`).
    pub(crate) fn counts(&self) -> Result<Counts> {
        let mapping = self.view.mapping();
        Ok(PageCache.residency(&mapping, 0..mapping.pages())?.counts())
    }

    /// Resident pages by the kernel's own sums (file blocks less swapped), for sampling often: takes some 25 us.
    pub(crate) fn resident_now(&self) -> Result<u64> {
        Ok(counts_of(&self.view.mapping())?.resident)
    }

    /// Pages out these guest physical ranges where the monitor has them mapped, until a look says that they are out.
    /// From outside, so that it is the same for each monitor.
    pub(crate) fn page_out(&self, extents: &Extents) -> Result<()> {
        let everywhere = sched_getaffinity(None)?;
        let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| everywhere.is_set(*cpu)).collect();
        for attempt in 0..ATTEMPTS {
            let left = self.resident_in(extents)?;
            if left.is_empty() {
                return Ok(());
            }
            // Pages that a CPU has just made wait in a batch of its own, out of reach, until the batch is full or
            // somebody pages out on that very CPU (mm/madvise.c `madvise_pageout`, `lru_add_drain`).
            let mut one = CpuSet::new();
            one.set(cpus[attempt % cpus.len()]);
            sched_setaffinity(None, &one)?;
            let asked = self.ask_for(&left);
            sched_setaffinity(None, &everywhere)?;
            asked?;
            stop::sleep(PAUSE)?;
        }
        // A few may be in memory without being mapped by the process, and only its own touch would change that. All subjects
        // are counted as they are then.
        let left: usize = self.resident_in(extents)?.iter().map(|(_, length)| length / PAGE_SIZE as usize).sum();
        ensure!(
            left as u64 <= extents.pages() / 1000,
            "{left} of {} pages cannot be paged out; is there swap?",
            extents.pages()
        );
        Ok(())
    }

    /// Asks the kernel once to page out what lies at these offsets.
    fn ask_for(&self, ranges: &[(usize, usize)]) -> Result<()> {
        for (offset, length) in ranges {
            let (mut address, mut length) = (self.address + offset, *length);
            while length > 0 {
                stop::check()?;
                let done = sys::page_out(self.process.as_fd(), address, length.min(16 << 20));
                let done = done.context("process_madvise: paging out needs root")?;
                ensure!(done > 0, "process_madvise went through nothing");
                (address, length) = (address + done, length.saturating_sub(done));
            }
        }
        Ok(())
    }

    /// Offsets and lengths in bytes of what is resident.
    fn resident_in(&self, extents: &Extents) -> Result<Vec<(usize, usize)>> {
        let mapping = self.view.mapping();
        let mut found = Vec::new();
        for extent in extents.iter() {
            let first = extent.start / PAGE_SIZE;
            let residency = PageCache.residency(&mapping, first..extent.end() / PAGE_SIZE)?;
            for run in residency.runs().filter(|run| run.state == PageState::Resident) {
                let bytes = |pages: u64| (pages * PAGE_SIZE) as usize;
                found.push((bytes(run.pages.start), bytes(run.pages.end - run.pages.start)));
            }
        }
        Ok(found)
    }
}

/// Where a `/proc/PID/maps` says that the file is mapped from its beginning and whole.
fn address_of(maps: &str, name: &str, bytes: u64) -> Option<usize> {
    maps.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let offset = fields.nth(1)?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        let whole = (end - start) as u64 == bytes && u64::from_str_radix(offset, 16) == Ok(0);
        (whole && line.contains(name)).then_some(start)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_whole_mapping() {
        let maps = "7000-8000 rw-s 00000000 00:01 7 /memfd:ram (deleted)\n\
                    10000-14000 rw-s 00004000 00:01 7 /memfd:ram (deleted)\n\
                    20000-24000 rw-s 00000000 00:01 7 /memfd:ram (deleted)\n";
        assert_eq!(address_of(maps, "memfd:ram", 0x4000), Some(0x20000));
        assert_eq!(address_of(maps, "memfd:ram", 0x8000), None);
        assert_eq!(address_of(maps, "other", 0x4000), None);
    }
}
