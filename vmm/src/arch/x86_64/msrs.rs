//! Which model-specific registers a guest's state has, which a host takes from outside, and those that are sets of features.
//! Numbers and names are those of Intel SDM volume 4 and Linux's `arch/x86/include/asm/msr-index.h`.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::cpuid::{self, CpuidEntry};

/// `IA32_TIME_STAMP_COUNTER`, which is saved apart from the others: [`Time`](super::state::Time).
pub const TSC: u32 = 0x10;

/// Registers that are no part of a guest's state here, though KVM may list them and takes them from user space whatever CPUID says: no
/// guest is told of what they belong to.
const NOT_TAKEN: &[RangeInclusive<u32>] = &[
    // Performance counters: IA32_PMCx, IA32_PERFEVTSELx, fixed counters, IA32_PERF_CAPABILITIES, control, PEBS, IA32_A_PMCx, IA32_DS_AREA.
    0xc1..=0xc8,
    0x186..=0x18d,
    0x309..=0x30c,
    0x345..=0x345,
    0x38d..=0x391,
    0x3f1..=0x3f2,
    0x4c1..=0x4c8,
    0x600..=0x600,
    // Nested VMX: IA32_VMX_BASIC to IA32_VMX_EXIT_CTLS2.
    0x480..=0x493,
    // Hyper-V's (Hyper-V TLFS, appendix "MSRs"; HV_X64_MSR_*).
    0x4000_0000..=0x4000_01ff,
    // AMD's counters: global control of version 2, K7's and family 15h's.
    0xc000_0300..=0xc000_0303,
    0xc001_0000..=0xc001_0007,
    0xc001_0200..=0xc001_020b,
];

/// `IA32_MCG_CAP`, which says how many banks there are and what they can. KVM does not list it, and no guest writes it.
const MCG_CAP: u32 = 0x179;
/// Registers that KVM has and does not list: MTRRs, variable and fixed ones and their default type, and the banks of machine checks, each
/// with control, status, address and misc (`KVM_MAX_MCE_BANKS` of them).
const NOT_LISTED: &[RangeInclusive<u32>] =
    &[0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff, 0x400..=0x47f];

/// Registers that are sets of features, whose bits a host must have itself: `IA32_CORE_CAPABILITIES`, `IA32_ARCH_CAPABILITIES`, and AMD's
/// `DE_CFG`, which says whether LFENCE serializes. They are part of a machine's description, and not of its state.
pub const FEATURES: [u32; 3] = [CORE_CAPABILITIES, ARCH_CAPABILITIES, AMD_DE_CFG];
const CORE_CAPABILITIES: u32 = 0xcf;
const ARCH_CAPABILITIES: u32 = 0x10a;
const AMD_DE_CFG: u32 = 0xc001_1029;
/// Bits of `IA32_ARCH_CAPABILITIES` that say what the processor lacks, so that a host without them offers more: RSBA and
/// RRSBA.
const LACKS: u64 = 1 << 2 | 1 << 19;

/// Names of bits of `IA32_ARCH_CAPABILITIES`.
#[rustfmt::skip]
const ARCH_CAPABILITY_NAMES: &[(u32, &str)] = &[
    (0, "rdcl_no"), (1, "ibrs_all"), (2, "rsba"), (3, "skip_l1dfl_vmentry"), (4, "ssb_no"), (5, "mds_no"), (6, "pschange_mc_no"),
    (7, "tsx_ctrl"), (8, "taa_no"), (13, "sbdr_ssdp_no"), (14, "fbsdp_no"), (15, "psdp_no"), (17, "fb_clear"), (18, "fb_clear_ctrl"),
    (19, "rrsba"), (20, "bhi_no"), (21, "xapic_disable"), (24, "pbrsb_no"), (25, "gds_ctrl"), (26, "gds_no"), (27, "rfds_no"),
    (28, "rfds_clear"), (62, "its_no"),
];

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
    #[error("the saved state has MSR {0:#x}, which is no part of a guest's state here")]
    NotTaken(u32),
}

/// Whether a register is saved, and taken where KVM has it.
pub fn is_taken(index: u32) -> bool {
    index != TSC && !FEATURES.contains(&index) && !NOT_TAKEN.iter().any(|range| range.contains(&index))
}

/// The registers to save, where KVM lists `listed`: each of which this host's vCPUs have.
pub fn saved(listed: &[u32]) -> Vec<u32> {
    let not_listed = NOT_LISTED.iter().cloned().flatten().chain([MCG_CAP]);
    let all: BTreeSet<_> = listed.iter().copied().chain(not_listed).filter(|index| is_taken(*index)).collect();
    all.into_iter().collect()
}

/// Whether a processor with this CPUID has this one of [`FEATURES`]. AMD's has no bit there: it has it where its host has.
pub fn has_feature(index: u32, cpuid: &[CpuidEntry]) -> bool {
    match index {
        CORE_CAPABILITIES => cpuid::has_feature(cpuid, "core_capabilities"),
        ARCH_CAPABILITIES => cpuid::has_feature(cpuid, "arch_capabilities"),
        _ => matches!(cpuid::vendor(cpuid).as_str(), "AuthenticAMD" | "HygonGenuine"),
    }
}

/// Why a guest that was told of the features `guest`, in MSRs, cannot run where there are those of `host`: one line a reason.
pub fn incompatibilities(guest: &[Msr], host: &[Msr]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let reason = |msr: &Msr| {
        let Msr { index, value } = *msr;
        if !FEATURES.contains(&index) {
            return Some(format!("its description has MSR {index:#x}, which is no set of features"));
        }
        if !seen.insert(index) {
            return Some(format!("its description has MSR {index:#x} twice"));
        }
        let here = host.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.value);
        let harmless = if index == ARCH_CAPABILITIES { LACKS } else { 0 };
        let missing = value & !here & !harmless;
        (missing != 0)
            .then(|| format!("it uses features of MSR {index:#x} that this host lacks: {}", named(index, missing)))
    };
    guest.iter().filter_map(reason).collect()
}

fn named(index: u32, bits: u64) -> String {
    let name = |bit: u32| match ARCH_CAPABILITY_NAMES.iter().find(|(number, _)| *number == bit) {
        Some((_, name)) if index == ARCH_CAPABILITIES => (*name).to_owned(),
        _ => format!("bit {bit}"),
    };
    (0..64).filter(|bit| bits >> bit & 1 == 1).map(name).collect::<Vec<_>>().join(", ")
}

/// What to do with the registers of saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// To be written, in their order.
    pub written: Vec<Msr>,
    /// This host does not list them: never written, and right only if they hold their value anyway.
    pub compared: Vec<Msr>,
}

/// Sorts what saved state brings. `listed` is what this host's KVM lists.
///
/// # Errors
/// When one comes twice or is never taken.
pub fn take(saved: &[Msr], listed: &BTreeSet<u32>) -> Result<Taken, MsrError> {
    let mut taken = Taken::default();
    let mut seen = BTreeSet::new();
    for &msr in saved {
        let Msr { index, .. } = msr;
        if !seen.insert(index) {
            return Err(MsrError::Twice(index));
        }
        if !is_taken(index) {
            return Err(MsrError::NotTaken(index));
        }
        let is_written = listed.contains(&index) || NOT_LISTED.iter().any(|range| range.contains(&index));
        if is_written { taken.written.push(msr) } else { taken.compared.push(msr) }
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
        take(saved, &BTreeSet::from([TSC, ARCH_CAPABILITIES, 0x3b, 0x174, 0x4000_0000]))
    }

    #[test]
    fn only_what_this_host_has_is_written() {
        let taken =
            take_here(&[msr(0x174, 1), msr(0x999, 2), msr(0x3b, 3), msr(0x2ff, 4), msr(0x401, 5), msr(MCG_CAP, 6)])
                .unwrap();
        assert_eq!(taken.written, [msr(0x174, 1), msr(0x3b, 3), msr(0x2ff, 4), msr(0x401, 5)]);
        assert_eq!(taken.compared, [msr(0x999, 2), msr(MCG_CAP, 6)]);
    }

    #[test]
    fn one_that_comes_twice_is_refused() {
        assert_eq!(take_here(&[msr(0x174, 1), msr(0x174, 1)]), Err(MsrError::Twice(0x174)));
    }

    #[test]
    fn what_no_guest_has_is_refused_though_it_is_listed() {
        for index in [TSC, 0x4000_0000, ARCH_CAPABILITIES, 0x345, 0x38f, 0x480, 0xc001_0200] {
            assert_eq!(take_here(&[msr(index, 0)]), Err(MsrError::NotTaken(index)));
        }
    }

    #[test]
    fn what_is_saved_is_what_is_taken() {
        let saved = saved(&[TSC, 0x174, 0x345, 0x38f, 0x480, 0x200, ARCH_CAPABILITIES, 0xc001_0004]);
        for (index, is_saved) in
            [(TSC, false), (0x174, true), (0x200, true), (0x2ff, true), (0x47f, true), (MCG_CAP, true), (0x38f, false)]
        {
            assert_eq!(saved.contains(&index), is_saved, "{index:#x}");
        }
        assert!(saved.is_sorted_by(|one, other| one < other), "one is there twice");
        let saved: Vec<_> = saved.into_iter().map(|index| msr(index, 0)).collect();
        assert!(take_here(&saved).is_ok());
    }

    #[test]
    fn features_must_be_here() {
        let host = [msr(ARCH_CAPABILITIES, 0b1010)];
        let why = |guest: &[Msr]| incompatibilities(guest, &host);
        assert_eq!(why(&[msr(ARCH_CAPABILITIES, 0b1000)]), [""; 0]);
        assert_eq!(why(&[msr(ARCH_CAPABILITIES, 0b1010 | LACKS)]), [""; 0]);
        assert!(why(&[msr(ARCH_CAPABILITIES, 0b1_1000 | 1 << 40)])[0].ends_with("this host lacks: ssb_no, bit 40"));
        assert!(why(&[msr(AMD_DE_CFG, 2)])[0].contains("0xc0011029"), "one that this host has not at all");
        assert!(why(&[msr(ARCH_CAPABILITIES, 0), msr(ARCH_CAPABILITIES, 0)])[0].contains("twice"));
        assert!(why(&[msr(0x174, 0)])[0].contains("no set of features"));
    }
}
