//! What the host tells of shared pages and does with them, by trying it on some of our own.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use memory_agent::{PAGE_SIZE, PageCache, PageOutError, PageOutReport, PageState, Probe, Residency, SwapDevice};
use rustix::io::Errno;
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use super::swap::any_keeps;
use super::sys::{self, PageRegion};
use super::{Area, Findings, State};
use crate::ram::{GuestRam, RamError};

/// Pages of the trial: some swapped, some resident, and holes behind. Less than 2 MiB, so that no huge page holds them.
const PAGES: u64 = 256;
const WRITTEN: u64 = 192;
const PAGED_OUT: u64 = 128;
/// In the middle of what is paged out.
const TOUCHED: u64 = 64;

/// Bit of a pagemap entry: the page table has the page.
const PM_PRESENT: u64 = 1 << 63;
/// Bit of a pagemap entry: the page table has a swap entry or a marker.
const PM_SWAP: u64 = 1 << 62;
/// Categories of `PAGEMAP_SCAN`.
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// What happens to cold pages on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ColdPages {
    /// They are paged out, and leave memory.
    Freed,
    /// They are paged out, and leave memory when the kernel needs it.
    Queued,
    /// There is no swap.
    NoSwap,
    /// It could not be tried, or failed.
    Failed,
}

impl fmt::Display for ColdPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Freed => "cold pages are kept cold",
            Self::Queued => "cold pages are kept on disk, and leave memory when the kernel needs it",
            Self::NoSwap => "without swap nothing gets cold here, and cold pages that arrive stay in memory",
            Self::Failed => "cold pages cannot be paged out",
        })
    }
}

/// Tries guest RAM and paging out.
pub(super) fn examine(found: &mut Findings, devices: &[SwapDevice]) -> ColdPages {
    let cold_pages = match filled_ram() {
        Ok(ram) => {
            let what = "guest RAM can be made, sealed and mapped";
            found.add(Area::Pages, "shared memory", State::Ok, "memfd", what);
            let cold_pages = page_out(found, &ram, devices);
            scan(found, &ram);
            cold_pages
        }
        Err(e) => {
            found.add(Area::Pages, "shared memory", State::Missing, "none", e);
            ColdPages::Failed
        }
    };
    calls(found);
    cold_pages
}

/// Guest RAM whose first pages are written through its mapping, so that page tables have them.
fn filled_ram() -> Result<GuestRam, RamError> {
    let ram = GuestRam::new(PAGES * PAGE_SIZE)?;
    for page in 0..WRITTEN {
        let address = ram.layout().address_of(page).unwrap_or_default();
        // Not the same byte all over: zram and swap keep such pages in another way.
        let content: Vec<u8> = (0..PAGE_SIZE).map(|byte| (byte.wrapping_mul(byte + page) >> 3) as u8).collect();
        let write = ram.memory().write_slice(&content, GuestAddress(address));
        write.map_err(|e| RamError::Access { page, what: "written", source: io::Error::other(e.to_string()) })?;
    }
    Ok(ram)
}

fn page_out(found: &mut Findings, ram: &GuestRam, devices: &[SwapDevice]) -> ColdPages {
    let mut untold = |value: &str, why: &dyn fmt::Display| {
        found.add(Area::Pages, "page out", State::Limited, value, why);
        let what = "with nothing paged out it cannot be told whether it shows swapped shared pages";
        found.add(Area::Pages, "pagemap", State::Limited, "not tried", what);
    };
    if devices.is_empty() {
        untold("not tried", &"without swap it cannot be tried");
        return ColdPages::NoSwap;
    }
    let tried = ram.page_out(std::slice::from_ref(&(0..PAGED_OUT))).and_then(|report| {
        // The only honest answer is another look, whatever was reported.
        Ok((report, ram.residency(0..PAGES)?))
    });
    match tried {
        Ok((report, truth)) => {
            let cold_pages = paged_out(found, report);
            pagemap(found, ram);
            if truth.get(TOUCHED) == Some(PageState::Swapped) {
                read_ahead(found, ram, &truth);
            }
            cold_pages
        }
        Err(RamError::PageOut(PageOutError::Kept(_))) if !sys::has_cachestat() && any_keeps(devices) => {
            untold("cannot be told", &"before Linux 6.5 pages that wait in the swap cache look like those that stayed");
            ColdPages::Queued
        }
        Err(e) => {
            untold("failed", &e);
            ColdPages::Failed
        }
    }
}

fn paged_out(found: &mut Findings, report: PageOutReport) -> ColdPages {
    let PageOutReport { asked, swapped, queued, attempts, .. } = report;
    let tries = if attempts == 1 { "1 try" } else { &format!("{attempts} tries") };
    let value = format!("{swapped} of {asked} pages swapped in {tries}");
    if queued > swapped {
        let what = "cold pages are written to disk, and leave memory when the kernel needs it";
        found.add(Area::Pages, "page out", State::Limited, format_args!("{value}, {queued} queued"), what);
        ColdPages::Queued
    } else {
        let state = State::ok_or(swapped * 10 >= asked * 9, State::Limited);
        found.add(Area::Pages, "page out", state, value, "cold pages can be kept cold");
        ColdPages::Freed
    }
}

/// Of the pages asked to be paged out, those that have left the page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gone {
    all: u64,
    /// Those that pagemap calls swapped.
    marked: u64,
}

impl Gone {
    /// From their pagemap entries. A page that waits in the swap cache for its disk has left the page table like one
    /// that is swapped.
    fn of(entries: &[u64]) -> Self {
        let gone = || entries.iter().filter(|entry| *entry & PM_PRESENT == 0);
        Self { all: gone().count() as u64, marked: gone().filter(|entry| *entry & PM_SWAP != 0).count() as u64 }
    }

    fn consequence(self) -> &'static str {
        match self {
            Self { all: 0, .. } => "all pages stayed, so it cannot be told whether it shows swapped shared pages",
            Self { marked: 0, .. } => {
                "stock kernel: pagemap is blind to swapped shared pages, so the page-cache probe is used"
            }
            _ => "marker-patched kernel: PM_SWAP works for shared memory, as a hint where to look",
        }
    }
}

fn pagemap(found: &mut Findings, ram: &GuestRam) {
    match pagemap_entries(ram) {
        Ok(entries) => {
            let gone = Gone::of(entries.get(..PAGED_OUT as usize).unwrap_or_default());
            let value = format!("PM_SWAP on {} of {} pages paged out", gone.marked, gone.all);
            found.add(Area::Pages, "pagemap", State::ok_or(gone.all > 0, State::Limited), value, gone.consequence());
        }
        Err(e) => found.add(Area::Pages, "pagemap", State::Limited, "cannot be read", e),
    }
}

fn pagemap_entries(ram: &GuestRam) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; PAGES as usize * size_of::<u64>()];
    let first = ram.host_address(0).unwrap_or_default() / PAGE_SIZE;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut bytes, first * size_of::<u64>() as u64)?;
    let (entries, _) = bytes.as_chunks();
    Ok(entries.iter().map(|entry| u64::from_ne_bytes(*entry)).collect())
}

/// Touches one page and looks which come with it.
fn read_ahead(found: &mut Findings, ram: &GuestRam, before: &Residency) {
    let mut page = [0; PAGE_SIZE as usize];
    let after = ram.read_pages(TOUCHED..TOUCHED + 1, &mut page).and_then(|()| {
        // What a disk reads ahead counts only once it has arrived.
        sleep(Duration::from_millis(5));
        ram.residency(0..PAGES)
    });
    let Ok(after) = after else { return };
    let swapped_in = |was, is| was == PageState::Swapped && is == PageState::Resident;
    let came: u64 = before.ranges_where(&after, swapped_in).map(|range| range.end - range.start).sum();
    let (state, value, consequence) = match came {
        0 | 1 => (State::Ok, "none".into(), "a page that is touched comes alone"),
        n => (
            State::Limited,
            format!("{n} pages for one"),
            "neighbours of a page that is touched get warm too: sysctl vm.page-cluster=0",
        ),
    };
    found.add(Area::Pages, "read-ahead", state, value, consequence);
}

fn scan(found: &mut Findings, ram: &GuestRam) {
    let mut regions = [PageRegion::default(); PAGES as usize];
    let start = ram.host_address(0).unwrap_or_default();
    let scanned = File::open("/proc/self/pagemap").and_then(|pagemap| {
        let range = start..start + PAGES * PAGE_SIZE;
        Ok(sys::pagemap_scan(pagemap, range, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, &mut regions)?)
    });
    let (value, consequence) = match scanned {
        Ok(regions) => {
            let count = |category| {
                let regions = regions.iter().filter(|region| region.categories & category != 0);
                regions.map(|region| region.end.saturating_sub(region.start) / PAGE_SIZE).sum::<u64>()
            };
            let value = format!("{} present, {} swapped", count(PAGE_IS_PRESENT), count(PAGE_IS_SWAPPED));
            (value, "marks of paged-out pages, where there are any, can be read in bulk".to_owned())
        }
        Err(e) if e.raw_os_error() == Some(Errno::NOTTY.raw_os_error()) => {
            ("not in this kernel (Linux 6.7)".into(), "marks, where there are any, must be read from pagemap".into())
        }
        Err(e) => ("refused".into(), e.to_string()),
    };
    found.add(Area::Pages, "PAGEMAP_SCAN", State::Ok, value, consequence);
}

fn calls(found: &mut Findings) {
    let there = |has: bool, since: &str| if has { "there".into() } else { format!("none (Linux {since})") };
    let cachestat = sys::has_cachestat();
    let what = if cachestat {
        "one call tells whether a range has swapped pages"
    } else {
        "every page must be looked at, and pages that wait in the swap cache cannot be told"
    };
    found.add(Area::Pages, "cachestat", State::ok_or(cachestat, State::Limited), there(cachestat, "6.5"), what);
    let madvise = sys::has_process_madvise();
    let what =
        if madvise { "for other processes' pages (needs CAP_SYS_NICE)" } else { "only own pages can be paged out" };
    let state = State::ok_or(madvise, State::Limited);
    found.add(Area::Pages, "process_madvise", state, there(madvise, "5.10"), what);
    let by = if cachestat { "mincore and cachestat" } else { "mincore and SEEK_DATA" };
    let what = "exact on any kernel; marks would be quicker, but are never more than a hint";
    found.add(Area::Pages, "probe", State::Ok, format_args!("{} ({by})", PageCache.name()), what);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_count_only_on_pages_that_are_gone() {
        assert_eq!(Gone::of(&[0, PM_PRESENT, 1, PM_SWAP, u64::MAX]), Gone { all: 3, marked: 1 });
        assert!(Gone::of(&[PM_SWAP, 0]).consequence().starts_with("marker-patched"));
        assert!(Gone::of(&[0, 0]).consequence().starts_with("stock"));
        assert!(Gone::of(&[PM_PRESENT]).consequence().starts_with("all pages stayed"));
        assert_eq!(Gone::of(&[]).all, 0);
    }

    #[test]
    fn pagemap_and_the_scan_agree_on_what_is_present() {
        let ram = filled_ram().unwrap();
        let present = pagemap_entries(&ram).unwrap().iter().filter(|entry| *entry & PM_PRESENT != 0).count();
        assert_eq!(present as u64, WRITTEN);
        let mut found = Findings::default();
        scan(&mut found, &ram);
        let value = &found.0[0].value;
        assert!(value == "192 present, 0 swapped" || value.starts_with("not in this kernel"), "{value}");
    }
}
