//! Memory of this process in a known pattern of holes, resident and swapped pages.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use memory_agent::{HintProbe, Mapping, PAGE_SIZE, PageCache, PageState, Probe, Residency, UffdMarker, page_out};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fstat, memfd_create};

use crate::{stop, sys};

/// Pages written at a time.
const STEP: u64 = 4096;

/// In which states pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Pattern {
    /// All in memory and mapped.
    Resident,
    /// Never written.
    Hole,
    /// All paged out.
    Swapped,
    /// Eight in memory, eight paged out, and so on.
    RunsOf8,
    /// Any of the three, page by page.
    Random,
}

impl Pattern {
    pub(super) const ALL: [Self; 5] = [Self::Resident, Self::Hole, Self::Swapped, Self::RunsOf8, Self::Random];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Resident => "resident",
            Self::Hole => "hole",
            Self::Swapped => "swapped",
            Self::RunsOf8 => "runs-of-8",
            Self::Random => "random",
        }
    }

    /// What a page should be.
    fn state(self, page: u64) -> PageState {
        match self {
            Self::Resident => PageState::Resident,
            Self::Hole => PageState::Hole,
            Self::Swapped => PageState::Swapped,
            Self::RunsOf8 if (page / 8).is_multiple_of(2) => PageState::Resident,
            Self::RunsOf8 => PageState::Swapped,
            // The same in every run: bits of a product that look random.
            Self::Random => match page.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) % 3 {
                0 => PageState::Resident,
                1 => PageState::Swapped,
                _ => PageState::Hole,
            },
        }
    }
}

/// A memory file of this process, mapped.
pub(super) struct Memory {
    file: File,
    map: sys::OwnMap,
    pub(super) pages: u64,
    /// What its pages are, by the exact probe, after it was made.
    pub(super) truth: Residency,
    /// Registered before anything was paged out, so that markers are left.
    pub(super) armed: Option<UffdMarker>,
}

impl Memory {
    /// `pages` pages in a pattern; `arm` has asynchronous write protection leave markers.
    pub(super) fn new(pages: u64, pattern: Pattern, arm: bool) -> Result<Self> {
        let file = File::from(memfd_create("thermocline-bench", MemfdFlags::CLOEXEC)?);
        file.set_len(pages * PAGE_SIZE)?;
        let map = sys::OwnMap::new(file.as_fd(), (pages * PAGE_SIZE) as usize)?;
        let truth = Residency::uniform(pages, PageState::Hole);
        let mut memory = Self { file, map, pages, truth, armed: None };
        let runs = |from: u64, wanted: PageState| -> Vec<Range<u64>> {
            let pages = (from..pages.min(from + STEP)).filter(|page| pattern.state(*page) == wanted);
            pages.fold(Vec::new(), |mut runs: Vec<Range<u64>>, page| {
                match runs.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => runs.push(page..page + 1),
                }
                runs
            })
        };
        for from in (0..pages).step_by(STEP as usize) {
            stop::check()?;
            for run in runs(from, PageState::Resident).into_iter().chain(runs(from, PageState::Swapped)) {
                memory.map.write_each_page(run);
            }
        }
        if arm {
            memory.armed = Some(UffdMarker::new(&memory.mapping()?)?);
        }
        for from in (0..pages).step_by(STEP as usize) {
            stop::check()?;
            let cold = runs(from, PageState::Swapped);
            if !cold.is_empty() {
                page_out(&memory.mapping()?, &cold).context("the pattern's cold pages")?;
            }
        }
        if let Some(armed) = &memory.armed {
            armed.arm()?;
        }
        memory.truth = PageCache.residency(&memory.mapping()?, 0..pages)?;
        let wrong = (0..pages).filter(|page| memory.truth.get(*page) != Some(pattern.state(*page))).count() as u64;
        ensure!(wrong <= pages / 100, "{wrong} of {pages} pages are not in the pattern {}", pattern.name());
        Ok(memory)
    }

    pub(super) fn mapping(&self) -> Result<Mapping<'_>> {
        Ok(Mapping::new(self.file.as_fd(), 0, self.map.address(), self.pages * PAGE_SIZE)?)
    }

    /// Pages that take memory or swap, by the file's own count.
    pub(super) fn allocated(&self) -> Result<u64> {
        Ok(fstat(&self.file)?.st_blocks as u64 * 512 / PAGE_SIZE)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Quicker than swapping in what is unmapped, and the swap device can go at once.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = fallocate(&self.file, flags, 0, self.pages * PAGE_SIZE);
    }
}
