//! Which model-specific registers a host takes from outside.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// `IA32_TIME_STAMP_COUNTER`, Intel SDM volume 4.
pub const TSC: u32 = 0x10;

/// Hyper-V's registers (Hyper-V TLFS, appendix "MSRs"; `HV_X64_MSR_*`). KVM lists them and takes them from user space
/// whatever CPUID says; no guest here is told of Hyper-V.
const HYPER_V: RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// Registers that are sets of features, whose bits a host must have itself. Intel SDM volume 4:
/// `IA32_CORE_CAPABILITIES`, `IA32_ARCH_CAPABILITIES`, `IA32_PERF_CAPABILITIES`.
pub const FEATURES: [u32; 3] = [0xcf, ARCH_CAPABILITIES, 0x345];
const ARCH_CAPABILITIES: u32 = 0x10a;
/// Bits of `IA32_ARCH_CAPABILITIES` that say what the processor lacks, so that a host without them offers more: RSBA and
/// RRSBA.
const LACKS: u64 = 1 << 2 | 1 << 19;

/// One register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// What it holds.
    pub value: u64,
}

/// Why the registers of saved state are not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsrError {
    /// Twice the same.
    #[error("the saved state has MSR {0:#x} twice")]
    Twice(u32),
    /// One that no machine here has.
    #[error("the saved state has MSR {0:#x}, which no guest of this program has")]
    NotTaken(u32),
    /// Features that this host has not.
    #[error("the saved state has features {missing:#x} in MSR {index:#x} that this host lacks")]
    Features {
        /// The register.
        index: u32,
        /// The bits.
        missing: u64,
    },
}

/// Whether a register is saved, and taken where KVM lists it.
pub fn is_taken(index: u32) -> bool {
    !HYPER_V.contains(&index)
}

/// What to do with the registers of saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// To be written, in their order.
    pub written: Vec<Msr>,
    /// This host does not list them: never written, and right only if they hold their value anyway.
    pub compared: Vec<Msr>,
}

/// Sorts what saved state brings. `listed` is what this host's KVM lists, `features` what those of [`FEATURES`] hold that
/// it has.
///
/// # Errors
/// When one comes twice, is never taken, or has features that this host lacks.
pub fn take(saved: &[Msr], listed: &BTreeSet<u32>, features: &[Msr]) -> Result<Taken, MsrError> {
    let mut taken = Taken::default();
    let mut seen = BTreeSet::new();
    for &msr in saved {
        let Msr { index, value } = msr;
        if !seen.insert(index) {
            return Err(MsrError::Twice(index));
        }
        if !is_taken(index) {
            return Err(MsrError::NotTaken(index));
        }
        if let Some(here) = features.iter().find(|feature| feature.index == index) {
            let harmless = if index == ARCH_CAPABILITIES { LACKS } else { 0 };
            let missing = value & !here.value & !harmless;
            if missing != 0 {
                return Err(MsrError::Features { index, missing });
            }
        }
        if listed.contains(&index) { taken.written.push(msr) } else { taken.compared.push(msr) }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, value: u64) -> Msr {
        Msr { index, value }
    }

    fn take_here(saved: &[Msr]) -> Result<Taken, MsrError> {
        let listed = BTreeSet::from([TSC, ARCH_CAPABILITIES, 0x174, *HYPER_V.start()]);
        take(saved, &listed, &[msr(ARCH_CAPABILITIES, 0b1010)])
    }

    #[test]
    fn only_what_this_host_lists_is_written() {
        let taken = take_here(&[msr(0x174, 1), msr(0x999, 2), msr(TSC, 3)]).unwrap();
        assert_eq!(taken.written, [msr(0x174, 1), msr(TSC, 3)]);
        assert_eq!(taken.compared, [msr(0x999, 2)]);
    }

    #[test]
    fn one_that_comes_twice_is_refused() {
        assert_eq!(take_here(&[msr(0x174, 1), msr(0x174, 1)]), Err(MsrError::Twice(0x174)));
    }

    #[test]
    fn what_no_guest_has_is_refused_though_it_is_listed() {
        assert_eq!(take_here(&[msr(*HYPER_V.start(), 0)]), Err(MsrError::NotTaken(*HYPER_V.start())));
    }

    #[test]
    fn features_must_be_here() {
        assert!(take_here(&[msr(ARCH_CAPABILITIES, 0b1000)]).is_ok());
        assert!(take_here(&[msr(ARCH_CAPABILITIES, 0b1010 | LACKS)]).is_ok());
        let refused = take_here(&[msr(ARCH_CAPABILITIES, 0b1_1000)]);
        assert_eq!(refused, Err(MsrError::Features { index: ARCH_CAPABILITIES, missing: 0b1_0000 }));
    }
}
