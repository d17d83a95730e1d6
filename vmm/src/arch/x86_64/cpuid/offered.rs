//! What guests are told of, of all that KVM supports: nothing whose state is not saved with a vCPU.

use super::CpuidEntry;
use super::features::{
    EXTENDED_ECX, LEAF1_ECX, LEAF1_EDX, LEAF7_1_EAX, LEAF7_EBX, LEAF7_ECX, LEAF7_EDX, Place, XSS_ECX,
};

/// Features that no guest has here.
const NOT_OFFERED: &[(Place, u32)] = &[
    // Nested virtualization (VMX, SVM with SKINIT): what a guest's hypervisor has in the processor is saved by KVM_GET_NESTED_STATE alone.
    (LEAF1_ECX, 1 << 5),
    (EXTENDED_ECX, 1 << 2 | 1 << 12),
    // Performance counters and what they write into memory (DTES64, DS_CPL, PDCM, DS, ARCH_LBR, ARCH_PERFMON_EXT; AMD's PERFCTR_CORE, _NB,
    // _LLC, IBS and LWP): counters of one processor mean nothing on another, and events differ from model to model.
    (LEAF1_ECX, 1 << 2 | 1 << 4 | 1 << 15),
    (LEAF1_EDX, 1 << 21),
    (LEAF7_EDX, 1 << 19),
    (LEAF7_1_EAX, 1 << 8),
    (EXTENDED_ECX, 1 << 23 | 1 << 24 | 1 << 28 | 1 << 10 | 1 << 15),
    // SGX, whose enclaves cannot leave their processor, and Intel PT.
    (LEAF7_EBX, 1 << 2 | 1 << 25),
    (LEAF7_ECX, 1 << 30),
    // Shadow stacks and indirect branch tracking: the shadow stack's pointer is no MSR.
    (LEAF7_ECX, 1 << 7),
    (LEAF7_EDX, 1 << 20),
    (XSS_ECX, 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15),
    // Event delivery by FRED, of which KVM saves in a form of its own what is pending.
    (LEAF7_1_EAX, 1 << 17),
];

/// Leaves that tell of these alone: counters, SGX, Intel PT, last branches, architectural counters, SVM, IBS, encryption of memory, AMD's
/// counters.
const EMPTY: &[u32] = &[0xa, 0x12, 0x14, 0x1c, 0x23, 0x8000_000a, 0x8000_001b, 0x8000_001f, 0x8000_0022];

/// `supported` without what is not offered.
pub fn offered(supported: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let mut entries = supported.to_vec();
    for entry in &mut entries {
        if EMPTY.contains(&entry.function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        for (place, bits) in NOT_OFFERED {
            if place.is_of(entry) {
                place.set(entry, place.get(entry) & !bits);
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::super::features::{SETS, named};
    use super::*;

    /// A host that has everything.
    fn everything() -> Vec<CpuidEntry> {
        let mut leaves: Vec<(u32, u32)> = SETS.iter().map(|(place, _)| (place.function, place.index)).collect();
        leaves.extend(EMPTY.iter().map(|leaf| (*leaf, 0)));
        leaves.sort_unstable();
        leaves.dedup();
        let all = |(function, index)| CpuidEntry { function, index, flags: 1, eax: !0, ebx: !0, ecx: !0, edx: !0 };
        leaves.into_iter().map(all).collect()
    }

    #[test]
    fn what_is_not_saved_is_not_offered() {
        let offered = offered(&everything());
        let names: Vec<_> = SETS.iter().flat_map(|(place, _)| named(*place, place.find(&offered))).collect();
        for name in [
            "vmx",
            "svm",
            "skinit",
            "npt",
            "pdcm",
            "dtes64",
            "ds_cpl",
            "dts",
            "arch_lbr",
            "perfctr_core",
            "perfctr_nb",
            "perfctr_llc",
            "perfmon_v2",
            "ibs",
            "lwp",
            "sgx",
            "sgx_lc",
            "intel_pt",
            "user_shstk",
            "ibt",
            "cet_u state",
            "pt state",
            "fred",
            "sev",
            "sme",
        ] {
            assert!(!names.iter().any(|other| other == name), "{name} is offered");
        }
        for name in
            ["avx512f", "x2apic", "lm", "kvmclock", "spec_ctrl", "constant_tsc", "amd_ssbd", "autoibrs", "xsaves"]
        {
            assert!(names.iter().any(|other| other == name), "{name} is not offered");
        }
        for leaf in EMPTY {
            let mut entries = offered.iter().filter(|entry| entry.function == *leaf);
            assert!(entries.all(|entry| (entry.eax, entry.ebx, entry.ecx, entry.edx) == (0, 0, 0, 0)), "{leaf:#x}");
        }
    }
}
