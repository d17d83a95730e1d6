//! Which probe to use on this host, and why.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::{ExactScan, Hint, HintProbe, Marker, PageCache, Probe, ProbeError, UffdMarker, trial};
use crate::memory::Target;
use crate::residency::Residency;
use crate::sys::pagemap::Source;
use crate::sys::{self, uffd};

/// The probes there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeKind {
    /// [`PageCache`]: exact, any kernel.
    PageCache,
    /// [`ExactScan`]: exact, kernels with the project's exact query.
    ExactScan,
    /// [`Marker`]: a hint, marker-patched kernels.
    Marker,
    /// [`UffdMarker`]: a hint, Linux 6.7, own memory.
    UffdMarker,
}

impl ProbeKind {
    /// Its name, as in options and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::PageCache => "page-cache",
            Self::ExactScan => "exact-scan",
            Self::Marker => "marker",
            Self::UffdMarker => "uffd-marker",
        }
    }
}

impl fmt::Display for ProbeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which probe somebody wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeChoice {
    /// Whichever fits the host: see [`KernelOffer::best`].
    #[default]
    Auto,
    /// This one.
    #[serde(untagged)]
    Only(ProbeKind),
}

impl FromStr for ProbeChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "page-cache" => Ok(Self::Only(ProbeKind::PageCache)),
            "exact-scan" => Ok(Self::Only(ProbeKind::ExactScan)),
            "marker" => Ok(Self::Only(ProbeKind::Marker)),
            "uffd-marker" => Ok(Self::Only(ProbeKind::UffdMarker)),
            other => {
                Err(format!("there is no probe {other:?}: use auto, page-cache, exact-scan, marker or uffd-marker"))
            }
        }
    }
}

impl fmt::Display for ProbeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Only(kind) => kind.fmt(f),
        }
    }
}

/// What this kernel offers to those who ask about pages, found out by trying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KernelOffer {
    /// `cachestat(2)`, Linux 6.5.
    pub cachestat: bool,
    /// `PAGEMAP_SCAN`, Linux 6.7.
    pub pagemap_scan: bool,
    /// `PAGEMAP_SCAN` with the project's exact query, which was asked about pages of this process's own and answered as it
    /// should; false where that cannot be tried because nothing can be paged out.
    pub exact_scan: bool,
    /// `process_madvise(2)`, Linux 5.10.
    pub process_madvise: bool,
    /// Asynchronous write protection of shared memory by userfaultfd, Linux 6.7.
    pub write_protect_async: bool,
    /// Whether pages that are paged out leave markers by themselves; `None` where that cannot be tried because nothing
    /// can be paged out.
    pub markers: Option<bool>,
}

impl KernelOffer {
    /// Looks once in a process's life, but for what is tried again until something can be paged out.
    pub fn of_this_host() -> Self {
        static TRIED: OnceLock<KernelOffer> = OnceLock::new();
        if let Some(offer) = TRIED.get() {
            return *offer;
        }
        let exact_scan = ExactScan::is_believed();
        let offer = Self {
            cachestat: sys::has_cachestat(),
            pagemap_scan: trial::understands(Source::PageTables),
            exact_scan: exact_scan == Some(true),
            process_madvise: sys::process::has_process_madvise(),
            write_protect_async: uffd::features().is_ok_and(|has| {
                let wanted = uffd::WP_SHMEM | uffd::WP_ASYNC;
                has & wanted == wanted
            }),
            markers: trial::markers(),
        };
        if offer.markers.is_some() && exact_scan.is_some() { *TRIED.get_or_init(|| offer) } else { offer }
    }

    /// The probe for this host, and why. Asynchronous write protection is never chosen without being asked for: it costs
    /// a guest a fault a page at its first write after each arming.
    pub fn best(&self) -> (ProbeKind, &'static str) {
        match self.markers {
            _ if self.exact_scan => (ProbeKind::ExactScan, "exact; this kernel has the exact query"),
            Some(true) => (ProbeKind::Marker, "this kernel leaves markers; what they leave open is looked up"),
            Some(false) => (ProbeKind::PageCache, "exact; this kernel leaves no markers, which would be quicker"),
            None => (ProbeKind::PageCache, "exact; nothing can be paged out here, so that markers cannot be tried"),
        }
    }

    /// Why a probe cannot be used here, or `None` when it can.
    pub fn why_not(&self, kind: ProbeKind) -> Option<&'static str> {
        match kind {
            ProbeKind::Marker if self.markers == Some(false) => {
                Some("this kernel leaves no markers: use page-cache, or boot a marker-patched kernel")
            }
            ProbeKind::ExactScan if !self.exact_scan => Some(
                "this kernel has no exact query, or its answer could not be tried: use page-cache, or boot a kernel with the project's patches and set up swap",
            ),
            ProbeKind::UffdMarker if !self.write_protect_async => {
                Some("userfaultfd cannot protect asynchronously here (Linux 6.7 does): use page-cache")
            }
            _ => None,
        }
    }
}

/// A probe that is ready to be used.
pub enum ChosenProbe {
    /// Its answers are certain.
    Exact(&'static dyn Probe),
    /// Its answers are to be resolved.
    Hint(Box<dyn HintProbe>),
}

impl fmt::Debug for ChosenProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ChosenProbe").field(&self.name()).finish()
    }
}

impl ChosenProbe {
    /// The probe wanted, for a target. Markers of write protection are armed from here on.
    ///
    /// # Errors
    /// When this host does not have it.
    pub fn new(choice: ProbeChoice, target: &dyn Target) -> Result<Self, ProbeError> {
        let offer = KernelOffer::of_this_host();
        let kind = match choice {
            ProbeChoice::Auto => offer.best().0,
            ProbeChoice::Only(kind) => kind,
        };
        if let Some(why) = offer.why_not(kind) {
            return Err(ProbeError::NotHere { probe: kind, why });
        }
        Ok(match kind {
            ProbeKind::PageCache => Self::Exact(&PageCache),
            ProbeKind::ExactScan => Self::Exact(&ExactScan),
            ProbeKind::Marker => Self::Hint(Box::new(Marker)),
            ProbeKind::UffdMarker if target.is_elsewhere() => {
                let why = "it works on memory of the own process alone: use page-cache or marker";
                return Err(ProbeError::NotHere { probe: kind, why });
            }
            ProbeKind::UffdMarker => Self::Hint(Box::new(UffdMarker::new(&target.mapping())?)),
        })
    }

    /// The quickest whose answers are certain.
    pub fn exact() -> Self {
        Self::Exact(exact_probe())
    }

    /// A short name for logs and tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Exact(probe) => probe.name(),
            Self::Hint(probe) => probe.name(),
        }
    }

    /// Whether its answers are certain.
    pub fn is_exact(&self) -> bool {
        matches!(self, Self::Exact(_))
    }

    /// The states of pages: holes are certain, and all of it is where the probe is exact.
    ///
    /// # Errors
    /// [`ProbeError`] when the pages are not in the target, or the kernel refuses.
    pub fn residency(&self, target: &dyn Target, pages: Range<u64>) -> Result<Residency, ProbeError> {
        match self {
            Self::Exact(probe) => probe.residency(target, pages),
            Self::Hint(probe) => probe.hint(target, pages)?.resolve(target, exact_probe()),
        }
    }

    /// What the probe says alone, quickly; an exact one answers in full.
    ///
    /// # Errors
    /// As [`ChosenProbe::residency`].
    pub fn hint(&self, target: &dyn Target, pages: Range<u64>) -> Result<Hint, ProbeError> {
        match self {
            Self::Exact(probe) => probe.residency(target, pages).map(Hint::of),
            Self::Hint(probe) => probe.hint(target, pages),
        }
    }

    /// See [`HintProbe::arm`].
    ///
    /// # Errors
    /// [`ProbeError`] when the kernel refuses.
    pub fn arm(&self) -> Result<(), ProbeError> {
        match self {
            Self::Exact(_) => Ok(()),
            Self::Hint(probe) => probe.arm(),
        }
    }
}

/// The quickest exact probe of this host.
pub fn exact_probe() -> &'static dyn Probe {
    if ExactScan::is_believed() == Some(true) { &ExactScan } else { &PageCache }
}
