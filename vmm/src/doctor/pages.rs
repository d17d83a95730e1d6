//! What the host tells of shared pages and does with them, by trying it on some of our own.

use std::fmt;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use memory_agent::{
    KernelOffer, Marker, PAGE_SIZE, PageNumber, PageOutError, PageOutReport, PageRange, PageState, ProbeKind,
    Residency, SwapDevice,
};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use super::swap::any_keeps;
use super::{Area, Findings, State};
use crate::ram::{GuestRam, RamError, RamPage};

/// Pages of the trial: some swapped, some resident, and holes behind. Less than 2 MiB, so that no huge page holds them.
const PAGES: u64 = 256;
const WRITTEN: u64 = 192;
const PAGED_OUT: u64 = 128;
/// In the middle of what is paged out.
const TOUCHED: RamPage = RamPage(64);

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
            page_out(found, &ram, devices)
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
    for page in RamPage(0).run(WRITTEN).pages() {
        let address = ram.layout().address_of(page).unwrap_or_default();
        // Not the same byte all over: zram and swap keep such pages in another way.
        let content: Vec<u8> =
            (0..PAGE_SIZE).map(|byte| (byte.wrapping_mul(byte + page.number()) >> 3) as u8).collect();
        let write = ram.memory().write_slice(&content, GuestAddress(address));
        write.map_err(|e| RamError::Access { page, what: "written", cause: io::Error::other(e.to_string()) })?;
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
    let tried = ram.page_out(std::slice::from_ref(&RamPage(0).run(PAGED_OUT))).and_then(|report| {
        // The only honest answer is another look, whatever was reported.
        Ok((report, ram.residency(ram.all_pages())?))
    });
    match tried {
        Ok((report, truth)) => {
            let cold_pages = paged_out(found, report);
            markers(found, ram, &truth);
            if truth.get(TOUCHED) == Some(PageState::Swapped) {
                read_ahead(found, ram, &truth);
            }
            cold_pages
        }
        Err(RamError::PageOut(PageOutError::Kept(_)))
            if !KernelOffer::of_this_host().cachestat && any_keeps(devices) =>
        {
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

/// Of the pages that are swapped, how many page tables mark as such.
fn markers(found: &mut Findings, ram: &GuestRam, truth: &Residency<RamPage>) {
    let swapped = truth.counts().swapped;
    match ram.hint(&Marker) {
        Ok(hint) => {
            let marked = truth.ranges_of(PageState::Swapped).flat_map(|run| run.pages());
            let marked = marked.filter(|page| hint.get(*page) == Some(PageState::Swapped)).count() as u64;
            let value = format!("PM_SWAP on {marked} of {swapped} swapped pages");
            let state = State::ok_or(swapped > 0, State::Limited);
            found.add(Area::Pages, "pagemap", state, value, of_markers(swapped, marked));
        }
        Err(e) => found.add(Area::Pages, "pagemap", State::Limited, "cannot be read", e),
    }
}

fn of_markers(swapped: u64, marked: u64) -> &'static str {
    match (swapped, marked) {
        (0, _) => "no page is swapped yet, so it cannot be told whether it shows swapped shared pages",
        (_, 0) => "stock kernel: pagemap is blind to swapped shared pages, so the page-cache probe is used",
        _ => "marker-patched kernel: PM_SWAP works for shared memory, as a hint where to look",
    }
}

/// Touches one page and looks which come with it.
fn read_ahead(found: &mut Findings, ram: &GuestRam, before: &Residency<RamPage>) {
    let mut page = [0; PAGE_SIZE as usize];
    let after = ram.read_pages(TOUCHED.run(1), &mut page).and_then(|()| {
        // What a disk reads ahead counts only once it has arrived.
        sleep(Duration::from_millis(5));
        ram.residency(ram.all_pages())
    });
    let Ok(after) = after else { return };
    let swapped_in = |was, is| was == PageState::Swapped && is == PageState::Resident;
    let came: u64 = before.ranges_where(&after, swapped_in).map(|range| range.page_count()).sum();
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

fn calls(found: &mut Findings) {
    let offer = KernelOffer::of_this_host();
    let there = |has: bool, since: &str| if has { "there".into() } else { format!("none (Linux {since})") };
    let what = if offer.pagemap_scan {
        "page tables can be asked in bulk: for markers, and for what another process has mapped"
    } else {
        "page tables must be read entry by entry"
    };
    found.add(Area::Pages, "PAGEMAP_SCAN", State::Ok, there(offer.pagemap_scan, "6.7"), what);
    let what = if offer.cachestat {
        "one call tells whether a range has swapped pages"
    } else {
        "every page must be looked at, and pages that wait in the swap cache cannot be told"
    };
    let state = State::ok_or(offer.cachestat, State::Limited);
    found.add(Area::Pages, "cachestat", state, there(offer.cachestat, "6.5"), what);
    let what = if offer.process_madvise {
        "for other processes' pages (needs CAP_SYS_NICE)"
    } else {
        "only own pages can be paged out"
    };
    let state = State::ok_or(offer.process_madvise, State::Limited);
    found.add(Area::Pages, "process_madvise", state, there(offer.process_madvise, "5.10"), what);
    let (probe, why) = offer.best();
    found.add(Area::Pages, "probe", State::Ok, probe, format_args!("{why} (--probe overrides)"));
    for kind in [ProbeKind::ExactScan, ProbeKind::Marker, ProbeKind::UffdMarker] {
        let what = offer.why_not(kind).unwrap_or(match kind {
            ProbeKind::UffdMarker => "marks without a patched kernel, at the cost of a fault at a page's first write",
            ProbeKind::ExactScan => "page tables and page cache in one call",
            _ => "marks that cost nobody anything; a hint",
        });
        let value = if offer.why_not(kind).is_none() { "can be used" } else { "cannot be used" };
        found.add(Area::Pages, kind.name(), State::Ok, value, what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_tell_what_kernel_this_is() {
        assert!(of_markers(128, 127).starts_with("marker-patched"));
        assert!(of_markers(128, 0).starts_with("stock"));
        assert!(of_markers(0, 0).starts_with("no page is swapped"));
    }

    #[test]
    fn what_the_trial_writes_is_resident() {
        let ram = filled_ram().unwrap();
        let believed = ram.hint(&Marker).unwrap();
        assert_eq!(believed.counts().resident, WRITTEN);
        assert_eq!(ram.residency(ram.all_pages()).unwrap().counts().resident, WRITTEN);
    }
}
