//! The system calls that the page-cache probe needs for a range, alone: as fast as anybody could be who asks these.

use std::ops::Range;

use anyhow::{Result, ensure};
use memory_agent::{Mapping, PageState, Residency};

use crate::sys;

/// Pages that one `mincore` is asked about.
const CHUNK: u64 = 4096;

/// One call.
#[derive(Clone, Debug)]
enum Call {
    SeekData(u64),
    SeekHole(u64),
    Mincore(Range<u64>),
    Cachestat(Range<u64>),
}

/// A list of calls.
pub(super) struct Calls(Vec<Call>);

impl Calls {
    /// What has to be asked when pages are what `truth` says: `mincore` about data, a chunk at a time; `cachestat` about
    /// each run that is not in memory; where such a run is neither all swapped nor all hole, the places where the two meet,
    /// and `cachestat` about each swapped part.
    pub(super) fn of(truth: &Residency) -> Self {
        let mut calls = Vec::new();
        let mut page = 0;
        loop {
            calls.push(Call::SeekData(page));
            let data = truth.runs_in(page..truth.len()).find(|run| run.state != PageState::Hole);
            let Some(data) = data.map(|run| run.pages.start) else { break };
            let chunk = data..truth.len().min(data + CHUNK);
            page = chunk.end;
            calls.push(Call::Mincore(chunk.clone()));
            let mut absent: Option<Range<u64>> = None;
            for run in truth.runs_in(chunk) {
                match (run.state, &mut absent) {
                    (PageState::Resident, absent) => {
                        absent.take().into_iter().for_each(|absent| about_absent(truth, absent, &mut calls));
                    }
                    (_, Some(absent)) => absent.end = run.pages.end,
                    (_, absent) => *absent = Some(run.pages),
                }
            }
            absent.into_iter().for_each(|absent| about_absent(truth, absent, &mut calls));
            if page == truth.len() {
                break;
            }
        }
        Self(calls)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// Makes them.
    pub(super) fn make(&self, mapping: &Mapping<'_>) -> Result<()> {
        let mut answers = [0; CHUNK as usize];
        for call in &self.0 {
            let done = match call {
                Call::SeekData(page) => sys::seek(mapping, *page, libc::SEEK_DATA),
                Call::SeekHole(page) => sys::seek(mapping, *page, libc::SEEK_HOLE),
                Call::Mincore(pages) => sys::mincore(mapping, pages, &mut answers),
                Call::Cachestat(pages) => sys::cachestat(mapping, pages),
            };
            ensure!(done, "{call:?} failed");
        }
        Ok(())
    }
}

fn about_absent(truth: &Residency, absent: Range<u64>, calls: &mut Vec<Call>) {
    calls.push(Call::Cachestat(absent.clone()));
    let counts = truth.counts_in(absent.clone());
    if counts.hole == 0 || counts.swapped == 0 {
        return;
    }
    let mut page = absent.start;
    for run in truth.runs_in(absent.clone()).filter(|run| run.state == PageState::Swapped) {
        calls.extend([Call::SeekData(page), Call::SeekHole(run.pages.start), Call::Cachestat(run.pages.clone())]);
        page = run.pages.end;
    }
    if page < absent.end {
        calls.push(Call::SeekData(page));
    }
}
