//! Registers of CPUID that are sets of features, and the names of their bits: those of Linux (`arch/x86/include/asm/cpufeatures.h`),
//! as `/proc/cpuinfo` has them, and of the processors' manuals where Linux has none.

use std::fmt;

use super::CpuidEntry;

/// One of the four registers in which CPUID answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the registers' own names")]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Leaf.
    pub function: u32,
    /// Subleaf.
    pub index: u32,
    /// Register.
    pub register: Register,
}

impl Place {
    /// What an entry of this leaf has there.
    pub(super) fn get(self, entry: &CpuidEntry) -> u32 {
        match self.register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }

    /// Changes it.
    pub(super) fn set(self, entry: &mut CpuidEntry, value: u32) {
        *match self.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        } = value;
    }

    /// What `entries` have there; 0 where there is no such leaf, as for a processor.
    pub(super) fn find(self, entries: &[CpuidEntry]) -> u32 {
        entries.iter().find(|entry| self.is_of(entry)).map_or(0, |entry| self.get(entry))
    }

    /// Whether an entry is of this leaf.
    pub(super) fn is_of(self, entry: &CpuidEntry) -> bool {
        (entry.function, entry.index) == (self.function, self.index)
    }
}

/// `7.0.ebx`
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, index, register } = self;
        let register = format!("{register:?}").to_lowercase();
        match function {
            0..=9 => write!(f, "{function}.{index}.{register}"),
            _ => write!(f, "{function:#x}.{index}.{register}"),
        }
    }
}

/// The names of a register's bits, with their numbers.
type Names = &'static [(u32, &'static str)];

const fn at(function: u32, index: u32, register: Register) -> Place {
    Place { function, index, register }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// 1.ecx and so on, which others name too.
pub(super) const LEAF1_ECX: Place = at(1, 0, Ecx);
pub(super) const LEAF1_EDX: Place = at(1, 0, Edx);
pub(super) const THERMAL_EAX: Place = at(6, 0, Eax);
pub(super) const LEAF7_EBX: Place = at(7, 0, Ebx);
pub(super) const LEAF7_ECX: Place = at(7, 0, Ecx);
pub(super) const LEAF7_EDX: Place = at(7, 0, Edx);
pub(super) const LEAF7_1_EAX: Place = at(7, 1, Eax);
pub(super) const LEAF7_2_EDX: Place = at(7, 2, Edx);
pub(super) const XCR0_EAX: Place = at(0xd, 0, Eax);
pub(super) const XSAVE_EAX: Place = at(0xd, 1, Eax);
pub(super) const XSS_ECX: Place = at(0xd, 1, Ecx);
pub(super) const KVM_EAX: Place = at(super::KVM_FEATURES, 0, Eax);
pub(super) const EXTENDED_ECX: Place = at(0x8000_0001, 0, Ecx);
pub(super) const EXTENDED_EDX: Place = at(0x8000_0001, 0, Edx);
pub(super) const SIZES_EAX: Place = at(0x8000_0008, 0, Eax);
pub(super) const SIZES_EBX: Place = at(0x8000_0008, 0, Ebx);
pub(super) const AMD_21_EAX: Place = at(0x8000_0021, 0, Eax);
pub(super) const TILE_PALETTES_EAX: Place = at(0x1d, 0, Eax);
pub(super) const AVX10_EBX: Place = at(0x24, 0, Ebx);

/// Registers that are sets of features: a guest that was told of one may use it, so the other host must have it.
#[rustfmt::skip]
pub(super) const SETS: &[(Place, Names)] = &[
    (LEAF1_ECX, &[
        (0, "sse3"), (1, "pclmulqdq"), (2, "dtes64"), (3, "monitor"), (4, "ds_cpl"), (5, "vmx"), (6, "smx"), (7, "est"), (8, "tm2"), (9, "ssse3"),
        (10, "cid"), (11, "sdbg"), (12, "fma"), (13, "cx16"), (14, "xtpr"), (15, "pdcm"), (17, "pcid"), (18, "dca"), (19, "sse4_1"),
        (20, "sse4_2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"), (24, "tsc_deadline_timer"), (25, "aes"), (26, "xsave"),
        (27, "osxsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"), (31, "hypervisor"),
    ]),
    (LEAF1_EDX, &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"), (9, "apic"),
        (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"), (18, "pn"), (19, "clflush"),
        (21, "dts"), (22, "acpi"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"), (28, "ht"), (29, "tm"), (31, "pbe"),
    ]),
    (THERMAL_EAX, &[(2, "arat")]),
    (at(6, 0, Ecx), &[(0, "aperfmperf"), (3, "epb")]),
    (LEAF7_EBX, &[
        (0, "fsgsbase"), (1, "tsc_adjust"), (2, "sgx"), (3, "bmi1"), (4, "hle"), (5, "avx2"), (6, "fdp_excptn_only"), (7, "smep"), (8, "bmi2"),
        (9, "erms"), (10, "invpcid"), (11, "rtm"), (12, "cqm"), (13, "zero_fcs_fds"), (14, "mpx"), (15, "rdt_a"), (16, "avx512f"),
        (17, "avx512dq"), (18, "rdseed"), (19, "adx"), (20, "smap"), (21, "avx512ifma"), (23, "clflushopt"), (24, "clwb"), (25, "intel_pt"),
        (26, "avx512pf"), (27, "avx512er"), (28, "avx512cd"), (29, "sha_ni"), (30, "avx512bw"), (31, "avx512vl"),
    ]),
    (LEAF7_ECX, &[
        (0, "prefetchwt1"), (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (4, "ospke"), (5, "waitpkg"), (6, "avx512_vbmi2"), (7, "user_shstk"),
        (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"), (11, "avx512_vnni"), (12, "avx512_bitalg"), (13, "tme"), (14, "avx512_vpopcntdq"),
        (16, "la57"), (22, "rdpid"), (24, "bus_lock_detect"), (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"), (29, "enqcmd"),
        (30, "sgx_lc"), (31, "pks"),
    ]),
    (LEAF7_EDX, &[
        (2, "avx512_4vnniw"), (3, "avx512_4fmaps"), (4, "fsrm"), (8, "avx512_vp2intersect"), (9, "srbds_ctrl"), (10, "md_clear"),
        (11, "rtm_always_abort"), (13, "tsx_force_abort"), (14, "serialize"), (15, "hybrid_cpu"), (16, "tsxldtrk"), (18, "pconfig"),
        (19, "arch_lbr"), (20, "ibt"), (22, "amx_bf16"), (23, "avx512_fp16"), (24, "amx_tile"), (25, "amx_int8"), (26, "spec_ctrl"),
        (27, "intel_stibp"), (28, "flush_l1d"), (29, "arch_capabilities"), (30, "core_capabilities"), (31, "spec_ctrl_ssbd"),
    ]),
    (LEAF7_1_EAX, &[
        (0, "sha512"), (1, "sm3"), (2, "sm4"), (4, "avx_vnni"), (5, "avx512_bf16"), (7, "cmpccxadd"), (8, "arch_perfmon_ext"), (10, "fzrm"),
        (11, "fsrs"), (12, "fsrc"), (17, "fred"), (18, "lkgs"), (19, "wrmsrns"), (21, "amx_fp16"), (22, "hreset"), (23, "avx_ifma"), (26, "lam"),
        (27, "msrlist"),
    ]),
    (at(7, 1, Ebx), &[(0, "ppin")]),
    (at(7, 1, Ecx), &[(5, "msr_imm")]),
    (at(7, 1, Edx), &[
        (4, "avx_vnni_int8"), (5, "avx_ne_convert"), (8, "amx_complex"), (10, "avx_vnni_int16"), (14, "prefetchiti"), (17, "uiret_uif"),
        (18, "cet_sss"), (19, "avx10"), (21, "apx_f"),
    ]),
    (LEAF7_2_EDX, &[(0, "intel_psfd"), (1, "ipred_ctrl"), (2, "rrsba_ctrl"), (3, "ddpd_u"), (4, "bhi_ctrl"), (5, "mcdt_no")]),
    (at(0xa, 0, Eax), &[]),
    (at(0xa, 0, Ecx), &[]),
    (at(0xa, 0, Edx), &[]),
    (XCR0_EAX, &[
        (0, "x87 state"), (1, "sse state"), (2, "avx state"), (3, "bndregs state"), (4, "bndcsr state"), (5, "opmask state"), (6, "zmm_hi256 state"),
        (7, "hi16_zmm state"), (9, "pkru state"), (17, "xtilecfg state"), (18, "xtiledata state"),
    ]),
    (at(0xd, 0, Edx), &[]),
    (XSAVE_EAX, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    (XSS_ECX, &[(8, "pt state"), (11, "cet_u state"), (12, "cet_s state"), (15, "lbr state")]),
    (at(0xd, 1, Edx), &[]),
    (at(0x14, 0, Ebx), &[]),
    (at(0x14, 0, Ecx), &[]),
    (at(0x1e, 1, Eax), &[]),
    (AVX10_EBX, &[(16, "avx10_128"), (17, "avx10_256"), (18, "avx10_512")]),
    (KVM_EAX, &[
        (0, "kvmclock (old)"), (1, "kvm_nopiodelay"), (3, "kvmclock"), (4, "kvm_asyncpf"), (5, "kvm_steal_time"), (6, "kvm_pv_eoi"),
        (7, "kvm_pv_unhalt"), (9, "kvm_pv_tlb_flush"), (10, "kvm_asyncpf_vmexit"), (11, "kvm_pv_ipi"), (12, "kvm_poll_control"),
        (13, "kvm_pv_sched_yield"), (14, "kvm_asyncpf_int"), (15, "kvm_msi_ext_dest_id"), (16, "kvm_hc_map_gpa_range"),
        (17, "kvm_migration_control"), (24, "kvmclock_stable_bit"),
    ]),
    (EXTENDED_ECX, &[
        (0, "lahf_lm"), (1, "cmp_legacy"), (2, "svm"), (3, "extapic"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"), (7, "misalignsse"),
        (8, "3dnowprefetch"), (9, "osvw"), (10, "ibs"), (11, "xop"), (12, "skinit"), (13, "wdt"), (15, "lwp"), (16, "fma4"), (17, "tce"),
        (19, "nodeid_msr"), (21, "tbm"), (22, "topoext"), (23, "perfctr_core"), (24, "perfctr_nb"), (26, "bpext"), (27, "ptsc"),
        (28, "perfctr_llc"), (29, "mwaitx"),
    ]),
    (EXTENDED_EDX, &[
        (11, "syscall"), (19, "mp"), (20, "nx"), (22, "mmxext"), (25, "fxsr_opt"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"), (30, "3dnowext"),
        (31, "3dnow"),
    ]),
    (at(0x8000_0007, 0, Ebx), &[(0, "overflow_recov"), (1, "succor"), (3, "smca")]),
    (at(0x8000_0007, 0, Edx), &[(8, "constant_tsc")]),
    (SIZES_EBX, &[
        (0, "clzero"), (1, "irperf"), (2, "xsaveerptr"), (4, "rdpru"), (9, "wbnoinvd"), (12, "ibpb"), (14, "ibrs"), (15, "stibp"),
        (16, "ibrs_always_on"), (17, "stibp_always_on"), (18, "ibrs_preferred"), (19, "ibrs_same_mode"), (23, "amd_ppin"), (24, "amd_ssbd"),
        (25, "virt_ssbd"), (26, "amd_ssb_no"), (27, "cppc"), (28, "amd_psfd"), (29, "btc_no"), (30, "ibpb_ret"),
    ]),
    (at(0x8000_000a, 0, Ebx), &[]),
    (at(0x8000_000a, 0, Edx), &[
        (0, "npt"), (1, "lbrv"), (2, "svm_lock"), (3, "nrip_save"), (4, "tsc_scale"), (5, "vmcb_clean"), (6, "flushbyasid"),
        (7, "decodeassists"), (10, "pausefilter"), (12, "pfthreshold"), (13, "avic"), (15, "v_vmsave_vmload"), (16, "vgif"), (25, "vnmi"),
    ]),
    (at(0x8000_001f, 0, Eax), &[(0, "sme"), (1, "sev"), (3, "sev_es"), (4, "sev_snp")]),
    (AMD_21_EAX, &[
        (0, "no_nested_data_bp"), (1, "fs_gs_ns"), (2, "lfence_rdtsc"), (5, "verw_clear"), (6, "null_sel_clr_base"), (8, "autoibrs"),
        (9, "no_smm_ctl_msr"), (10, "fsrs"), (11, "fsrc"), (13, "prefetchi"), (17, "gp_on_user_cpuid"), (18, "epsf"), (20, "prefetchi"),
        (24, "erapsize"), (27, "sbpb"), (28, "ibpb_brtype"), (29, "srso_no"), (30, "srso_user_kernel_no"), (31, "srso_bp_spec_reduce"),
    ]),
    (at(0x8000_0021, 0, Ecx), &[(1, "tsa_sq_no"), (2, "tsa_l1_no")]),
    (at(0x8000_0022, 0, Eax), &[(0, "perfmon_v2"), (1, "amd_lbr_v2"), (2, "amd_lbr_pmc_freeze")]),
    (at(0x8000_0022, 0, Ebx), &[]),
    (at(0xc000_0001, 0, Edx), &[]),
];

/// The features `bits` of a register, by name as far as they have one.
pub(super) fn named(place: Place, bits: u32) -> Vec<String> {
    let names = SETS.iter().find(|(other, _)| *other == place).map_or(&[] as Names, |(_, names)| names);
    let name = |bit: u32| match names.iter().find(|(number, _)| *number == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bit {bit} of CPUID {place}"),
    };
    (0..32).filter(|bit| bits >> bit & 1 == 1).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_set_is_there_once_and_each_bit_has_one_name() {
        for (number, (place, names)) in SETS.iter().enumerate() {
            assert!(!SETS[..number].iter().any(|(other, _)| other == place), "{place} is there twice");
            let mut bits: Vec<_> = names.iter().map(|(bit, _)| *bit).collect();
            assert!(bits.iter().all(|bit| *bit < 32), "{place}");
            bits.dedup();
            assert!(bits.is_sorted() && bits.len() == names.len(), "{place}: a bit is there twice or out of place");
        }
    }

    #[test]
    fn what_has_no_name_is_told_by_its_place() {
        let names = named(LEAF7_EBX, 1 << 5 | 1 << 16 | 1 << 22);
        assert_eq!(names, ["avx2", "avx512f", "bit 22 of CPUID 7.0.ebx"]);
        assert_eq!(named(at(0x8000_0021, 0, Eax), 1 << 3), ["bit 3 of CPUID 0x80000021.0.eax"]);
    }
}
