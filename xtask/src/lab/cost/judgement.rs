//! Figures held against their targets.

use std::fmt;

use super::figures::Cost;

/// What the patches may cost at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Target {
    /// Nothing: no more than the two kernels' repetitions differ among themselves.
    Nothing,
    /// So many per cent.
    Percent(f64),
}

/// The exact query's instructions, at most this part of what the same answer costs on a stock kernel.
pub(super) const EXACT_RATIO: f64 = 0.2;

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.pad("0"),
            Self::Percent(percent) => f.pad(&format!("{percent} %")),
        }
    }
}

/// What has no target is published all the same.
pub(super) fn target(name: &str) -> Option<Target> {
    let reading = ["pagemap-batch-", "pagemap-single-", "scan-"].iter().find_map(|start| name.strip_prefix(start));
    match (reading, name) {
        (Some("present" | "hole" | "swapped"), _) => Some(Target::Nothing),
        (_, "swap-in-sequential" | "swap-in-random" | "swap-in-write-sequential") => Some(Target::Percent(0.8)),
        (_, "swap-in-sequential-readahead" | "swap-in-random-readahead") => Some(Target::Percent(0.8)),
        (_, "reclaim-madvise" | "reclaim-cgroup") => Some(Target::Percent(1.0)),
        _ => None,
    }
}

/// A measurement on both kernels.
pub(super) struct Comparison<'a> {
    pub(super) name: &'a str,
    pub(super) stock: Cost,
    pub(super) patched: Cost,
    pub(super) target: Option<Target>,
}

impl Comparison<'_> {
    /// Instructions a page that the patches cost.
    pub(super) fn difference(&self) -> f64 {
        self.patched.median - self.stock.median
    }

    pub(super) fn percent(&self) -> f64 {
        self.difference() / self.stock.median * 100.0
    }

    /// How far the repetitions on the two kernels lie apart, together; and what was rounded off.
    pub(super) fn noise(&self) -> f64 {
        self.stock.spread() + self.patched.spread() + 0.01
    }

    pub(super) fn is_met(&self) -> Option<bool> {
        Some(match self.target? {
            Target::Nothing => self.difference() <= self.noise(),
            Target::Percent(percent) => self.percent() <= percent,
        })
    }
}

/// The exact query, and what else has to be asked for the same.
pub(super) struct ExactRow<'a> {
    pub(super) range: &'a str,
    pub(super) exact: Cost,
    pub(super) others: Cost,
}

impl ExactRow<'_> {
    pub(super) fn ratio(&self) -> f64 {
        self.exact.median / self.others.median
    }

    /// Where all is mapped nobody needs to ask the file: there is no target.
    pub(super) fn is_met(&self) -> Option<bool> {
        (self.range != "present").then(|| self.ratio() <= EXACT_RATIO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_noise_is_missed() {
        let quiet = Cost { median: 28.0, min: 28.0, max: 28.0 };
        let row = |more: f64, target| {
            let patched = Cost { median: 28.0 + more, min: 28.0 + more, max: 28.0 + more };
            Comparison { name: "", stock: quiet, patched, target }.is_met()
        };
        assert_eq!(row(1.0, Some(Target::Nothing)), Some(false));
        assert_eq!(row(-1.0, Some(Target::Nothing)), Some(true));
        assert_eq!(row(0.1, Some(Target::Percent(0.8))), Some(true));
        assert_eq!(row(0.3, Some(Target::Percent(0.8))), Some(false));
        assert_eq!(row(1.0, None), None);
    }
}
