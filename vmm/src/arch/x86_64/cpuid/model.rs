//! Models of processors: the micro-architecture levels of the x86-64 psABI (its chapter 3.1.1), so that hosts that differ have something
//! in common.
//!
//! What a level has is the same on every host: a guest that was started as `x86-64-v3` somewhere can run wherever `x86-64-v3` can be
//! started, by the same vendor. Two things are the host's: protection against speculative execution, which a guest should not do
//! without where there is some; and what says nothing of features, such as caches and the name.

use super::CpuidEntry;
use super::features::{
    AMD_21_EAX, EXTENDED_ECX, EXTENDED_EDX, KVM_EAX, LEAF1_ECX, LEAF1_EDX, LEAF7_2_EDX, LEAF7_EBX, LEAF7_EDX, Place,
    SETS, SIZES_EAX, SIZES_EBX, THERMAL_EAX, TILE_PALETTES_EAX, XCR0_EAX, XSAVE_EAX, named,
};

/// What a guest is told of its processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuModel {
    /// All that this host has and a guest can have.
    #[default]
    Host,
    /// A level, the same on every host.
    Level(Level),
}

/// A level of the x86-64 psABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Every 64-bit processor.
    V1,
    /// From 2008 on: SSE4.2, POPCNT.
    V2,
    /// From 2013 on: AVX2, BMI, FMA; with AES and RDRAND.
    V3,
    /// From 2017 on: AVX-512.
    V4,
}

impl Level {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "x86-64-v1",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }
}

/// This host cannot be a processor of that level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host cannot be {level}: it lacks {missing}; choose a lower level, or --cpu host",
    level = .level.name(), missing = .missing.join(", ")
)]
pub struct ModelError {
    /// The level.
    pub level: Level,
    /// Names of features that it needs and the host has not.
    pub missing: Vec<String>,
}

/// What levels have, from the lowest that has it on. Besides what the psABI names for programs there is what kernels work with and every
/// processor of the level has, by either vendor, or KVM itself has for all.
#[rustfmt::skip]
const FEATURES: &[(Level, Place, u32)] = &[
    // fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2
    (Level::V1, LEAF1_EDX, 0x078b_fbff),
    // By KVM: x2apic, tsc_deadline_timer, hypervisor; arat; tsc_adjust
    (Level::V1, LEAF1_ECX, 1 << 21 | 1 << 24 | 1 << 31),
    (Level::V1, THERMAL_EAX, 1 << 2),
    (Level::V1, LEAF7_EBX, 1 << 1),
    // syscall nx lm
    (Level::V1, EXTENDED_EDX, 1 << 11 | 1 << 20 | 1 << 29),
    // sse3 ssse3 cx16 sse4_1 sse4_2 popcnt; lahf_lm
    (Level::V2, LEAF1_ECX, 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23),
    (Level::V2, EXTENDED_ECX, 1),
    // fma movbe xsave avx f16c; avx2 bmi1 bmi2; abm (LZCNT); their state
    (Level::V3, LEAF1_ECX, 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29),
    (Level::V3, LEAF7_EBX, 1 << 3 | 1 << 5 | 1 << 8),
    (Level::V3, EXTENDED_ECX, 1 << 5),
    (Level::V3, XCR0_EAX, 0b111),
    // pclmulqdq aes rdrand; fsgsbase smep; rdtscp; xsaveopt
    (Level::V3, LEAF1_ECX, 1 << 1 | 1 << 25 | 1 << 30),
    (Level::V3, LEAF7_EBX, 1 | 1 << 7),
    (Level::V3, EXTENDED_EDX, 1 << 27),
    (Level::V3, XSAVE_EAX, 1),
    // avx512f avx512dq avx512cd avx512bw avx512vl, their state
    (Level::V4, LEAF7_EBX, 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31),
    (Level::V4, XCR0_EAX, 0b1110_0000),
    // pcid; invpcid rdseed adx smap clflushopt; xsavec xgetbv1 xsaves; pdpe1gb
    (Level::V4, LEAF1_ECX, 1 << 17),
    (Level::V4, LEAF7_EBX, 1 << 10 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 23),
    (Level::V4, XSAVE_EAX, 0b1110),
    (Level::V4, EXTENDED_EDX, 1 << 26),
];

/// What every level has as its host has it.
#[rustfmt::skip]
const AS_HOST: &[(Place, u32)] = &[
    // Protection against speculative execution: md_clear spec_ctrl intel_stibp flush_l1d spec_ctrl_ssbd
    (LEAF7_EDX, 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 31),
    // intel_psfd ipred_ctrl rrsba_ctrl bhi_ctrl mcdt_no
    (LEAF7_2_EDX, 1 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5),
    // ibpb ibrs stibp, whether they are always on, amd_ssbd virt_ssbd amd_ssb_no amd_psfd btc_no ibpb_ret
    (SIZES_EBX, 1 << 12 | 1 << 14 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 24 | 1 << 25 | 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30),
    // lfence_rdtsc verw_clear autoibrs sbpb ibpb_brtype srso_no srso_user_kernel_no
    (AMD_21_EAX, 1 << 2 | 1 << 5 | 1 << 8 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30),
    // What AMD's processors repeat of 1.edx.
    (EXTENDED_EDX, 0x0183_f3ff),
    // cmp_legacy and topoext, which tell AMD's topology.
    (EXTENDED_ECX, 1 << 1 | 1 << 22),
    // KVM's own, from Linux 5.10 on: kvmclock, nopiodelay, asyncpf, steal_time, pv_eoi, pv_unhalt, pv_tlb_flush, pv_ipi, poll_control,
    // pv_sched_yield, asyncpf_int.
    (KVM_EAX, 0x0100_7afb),
];

/// Physical address bits of every level, unless the machine's memory needs more: as many as QEMU's models have.
const PHYSICAL_BITS: u32 = 40;
/// Linear address bits of four-level page tables.
const LINEAR_BITS: u32 = 48;

const EXTENDED_STATE: u32 = 0xd;
/// Bytes of the legacy area and the header of extended state, behind which components lie (Intel SDM volume 1, section 13.4).
const XSAVE_HEADER_END: u32 = 576;

impl CpuModel {
    /// The processor of this model on a host that offers `offered`, for a machine with addresses of `address_bits`.
    ///
    /// # Errors
    /// When the host lacks what the model has.
    pub fn of(self, offered: &[CpuidEntry], address_bits: u32) -> Result<Vec<CpuidEntry>, ModelError> {
        match self {
            Self::Host => Ok(offered.to_vec()),
            Self::Level(level) => level.of(offered, address_bits),
        }
    }
}

impl Level {
    /// The features that this level has in a register.
    fn features(self, place: Place) -> u32 {
        let here = FEATURES.iter().filter(|(level, other, _)| *level <= self && *other == place);
        here.fold(0, |features, (.., bits)| features | bits)
    }

    fn missing(self, offered: &[CpuidEntry]) -> Vec<String> {
        let missing = |place: Place| named(place, self.features(place) & !place.find(offered));
        SETS.iter().flat_map(|(place, _)| missing(*place)).collect()
    }

    fn of(self, offered: &[CpuidEntry], address_bits: u32) -> Result<Vec<CpuidEntry>, ModelError> {
        let missing = self.missing(offered);
        if !missing.is_empty() {
            return Err(ModelError { level: self, missing });
        }
        let mut entries = offered.to_vec();
        for entry in &mut entries {
            self.restrict(entry);
            if SIZES_EAX.is_of(entry) {
                let physical = (entry.eax & 0xff).min(PHYSICAL_BITS.max(address_bits));
                entry.eax = physical | (entry.eax >> 8 & 0xff).min(LINEAR_BITS) << 8;
            }
        }
        let state = self.features(XCR0_EAX);
        entries
            .retain(|entry| entry.function != EXTENDED_STATE || entry.index < 2 || is_component_of(state, entry.index));
        set_state_size(&mut entries, state);
        Ok(entries)
    }

    /// Leaves of an entry's features those of this level, and as they are on the host those that are the host's.
    fn restrict(self, entry: &mut CpuidEntry) {
        for (place, _) in SETS {
            if place.is_of(entry) {
                let as_host = AS_HOST.iter().filter(|(other, _)| other == place).fold(0, |bits, (_, more)| bits | more);
                place.set(entry, place.get(entry) & (self.features(*place) | as_host));
            }
        }
        if TILE_PALETTES_EAX.function == entry.function {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    }
}

fn is_component_of(state: u32, component: u32) -> bool {
    component < 32 && state >> component & 1 == 1
}

/// Has leaf 0xd say what these components of extended state take: what is on (which KVM keeps up to date), and all.
fn set_state_size(entries: &mut [CpuidEntry], state: u32) {
    let components = entries.iter().filter(|entry| entry.function == EXTENDED_STATE && entry.index >= 2);
    let end = components.map(|entry| entry.ebx.saturating_add(entry.eax)).fold(XSAVE_HEADER_END, u32::max);
    for entry in entries.iter_mut().filter(|entry| entry.function == EXTENDED_STATE) {
        match entry.index {
            0 => (entry.ebx, entry.ecx) = if state == 0 { (0, 0) } else { (XSAVE_HEADER_END, end) },
            1 => entry.ebx = 0,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::features::Register;
    use super::super::{for_vcpu, has_feature, incompatibilities};
    use super::*;

    const LEVELS: [Level; 4] = [Level::V1, Level::V2, Level::V3, Level::V4];

    /// A host that has what `level` needs and, beyond that, what `more` says of each register.
    fn host(level: Level, more: &dyn Fn(Place) -> u32) -> Vec<CpuidEntry> {
        let mut entries: Vec<CpuidEntry> = Vec::new();
        let mut add = |place: Place, bits: u32| {
            let at = entries.iter().position(|entry| place.is_of(entry)).unwrap_or_else(|| {
                entries.push(CpuidEntry { function: place.function, index: place.index, ..Default::default() });
                entries.len() - 1
            });
            let there = place.get(&entries[at]);
            place.set(&mut entries[at], there | bits);
        };
        for (place, _) in SETS {
            add(*place, level.features(*place) | more(*place));
        }
        add(SIZES_EAX, 46 | 57 << 8);
        // Components of AVX, of the opmasks, of the two halves of AVX-512's registers, and of PKRU.
        let sizes = [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)];
        for (index, eax, ebx) in sizes {
            entries.push(CpuidEntry { function: 0xd, index, flags: 1, eax, ebx, ..Default::default() });
        }
        entries
    }

    fn of(level: Level, host: &[CpuidEntry]) -> Vec<CpuidEntry> {
        CpuModel::Level(level).of(host, 36).unwrap()
    }

    #[test]
    fn a_level_has_what_the_psabi_says() {
        let psabi: [(Level, &[&str]); 4] = [
            (Level::V1, &["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2", "lm"]),
            (Level::V2, &["cx16", "lahf_lm", "popcnt", "sse3", "sse4_1", "sse4_2", "ssse3"]),
            (Level::V3, &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]),
            (Level::V4, &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
        ];
        for level in LEVELS {
            let cpuid = of(level, &host(Level::V4, &|_| !0));
            for (least, names) in psabi {
                for name in names {
                    assert_eq!(has_feature(&cpuid, name), level >= least, "{name} of {}", level.name());
                }
            }
            for name in
                ["avx512_vnni", "sha_ni", "la57", "arch_capabilities", "constant_tsc", "sse4a", "amx_tile", "pku"]
            {
                assert!(!has_feature(&cpuid, name), "{name} of {}", level.name());
            }
            assert!(has_feature(&cpuid, "spec_ctrl") && has_feature(&cpuid, "kvmclock"), "{}", level.name());
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let without = host(Level::V2, &|_| 0);
        let refused = CpuModel::Level(Level::V3).of(&without, 36).unwrap_err().to_string();
        assert!(refused.starts_with("this host cannot be x86-64-v3: it lacks pclmulqdq, fma, movbe"), "{refused}");
        assert!(refused.contains("avx2") && !refused.contains("sse4_2"), "{refused}");
        assert_eq!(CpuModel::Host.of(&without, 36).unwrap(), without);
    }

    #[test]
    fn addresses_and_extended_state_are_those_of_the_level() {
        let rich = host(Level::V4, &|_| !0);
        let size = |level| of(level, &rich).iter().find(|entry| (entry.function, entry.index) == (0xd, 0)).unwrap().ecx;
        assert_eq!(LEVELS.map(size), [0, 0, 832, 2688]);
        let components =
            |level| of(level, &rich).iter().filter(|entry| entry.function == 0xd && entry.index > 1).count();
        assert_eq!(LEVELS.map(components), [0, 0, 1, 4]);
        let bits = |cpuid: Vec<CpuidEntry>| SIZES_EAX.find(&cpuid) & 0xffff;
        assert_eq!(bits(of(Level::V1, &rich)), 40 | 48 << 8);
        assert_eq!(bits(CpuModel::Level(Level::V1).of(&rich, 41).unwrap()), 41 | 48 << 8);
        let high = Place { function: 0xd, index: 0, register: Register::Edx };
        assert_eq!(high.find(&of(Level::V4, &rich)), 0);
    }

    proptest! {
        /// Whatever two hosts have beyond a level, its guests can go from one to the other and back, if they protect in the same way.
        #[test]
        fn a_level_is_common_to_all_hosts_that_have_it(
            level in prop::sample::select(&LEVELS), one: [u32; 64], other: [u32; 64], protection: u32, vcpus in 1_u8..=255,
        ) {
            let host = |more: &[u32; 64]| {
                host(level, &|place| {
                    let number = SETS.iter().position(|(other, _)| *other == place).unwrap() % 64;
                    let as_host = AS_HOST.iter().filter(|(other, _)| *other == place).fold(0, |bits, (_, more)| bits | more);
                    more[number] & !as_host | protection & as_host
                })
            };
            let (one, other) = (host(&one), host(&other));
            let guest = for_vcpu(&of(level, &one), 0, vcpus);
            prop_assert_eq!(incompatibilities(&guest, &other), Vec::<String>::new());
            prop_assert_eq!(incompatibilities(&for_vcpu(&of(level, &other), 0, vcpus), &one), Vec::<String>::new());
        }
    }
}
