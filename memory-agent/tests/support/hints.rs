//! How right a hint is.

use memory_agent::{
    Hint, HintProbe, KernelOffer, Mapping, Marker, PageCache, PageState, ProbeKind, Residency, UffdMarker,
};

use super::Memory;

/// How often a hint was wrong about swapped pages.
#[derive(Debug, Default)]
pub(crate) struct Errors {
    pages: u64,
    pub(crate) swapped: u64,
    /// Believed swapped, and a hole or resident.
    false_positives: u64,
    /// Swapped, and open or believed resident.
    false_negatives: u64,
}

impl Errors {
    pub(crate) fn count(&mut self, truth: &Residency, hint: &Hint) {
        self.pages += truth.len();
        for (page, state) in truth.runs().flat_map(|run| run.pages.map(move |page| (page, run.state))) {
            let believed = hint.get(page) == Some(PageState::Swapped);
            match (state == PageState::Swapped, believed) {
                (true, true) => self.swapped += 1,
                (true, false) => {
                    self.swapped += 1;
                    self.false_negatives += 1;
                }
                (false, true) => self.false_positives += 1,
                (false, false) => {}
            }
        }
    }

    pub(crate) fn show(&self, probe: &str, scenario: &str) {
        let million = |n: u64| n * 1_000_000 / self.pages.max(1);
        eprintln!(
            "{probe}, {scenario}: of {} pages, {} of them swapped: {} false positives and {} false negatives a million",
            self.pages,
            self.swapped,
            million(self.false_positives),
            million(self.false_negatives)
        );
    }
}

/// What must be true of any hint at a quiet point.
pub(crate) fn check(hint: &Hint, truth: &Residency, mapping: &Mapping<'_>) {
    for run in hint.runs().filter(|run| run.state == PageState::Resident) {
        // An entry in a page table is no hint.
        assert_eq!(truth.counts_in(run.pages.clone()).resident, run.pages.end - run.pages.start, "{run:?}");
    }
    let resolved = hint.clone().resolve(mapping, &PageCache).unwrap();
    for hole in resolved.ranges_of(PageState::Hole) {
        assert_eq!(truth.counts_in(hole.clone()).hole, hole.end - hole.start, "{hole:?} is no hole");
    }
    let missed = resolved.ranges_where(truth, |resolved, truth| resolved != truth && truth == PageState::Swapped);
    assert_eq!(missed.count(), 0, "the exact probe has left swapped pages open");
}

/// The probes that this kernel has.
pub(crate) fn probes(memory: &Memory) -> Vec<Box<dyn HintProbe>> {
    let mut probes: Vec<Box<dyn HintProbe>> = Vec::new();
    // On other kernels it would see the markers that the other one has left.
    if KernelOffer::of_this_host().markers == Some(true) {
        probes.push(Box::new(Marker));
    }
    if KernelOffer::of_this_host().write_protect_async {
        probes.push(Box::new(UffdMarker::new(&memory.mapping()).unwrap()));
    } else {
        eprintln!("uffd-marker is not tested: {}", KernelOffer::of_this_host().why_not(ProbeKind::UffdMarker).unwrap());
    }
    probes
}
