//! CPUID: what a guest is told, and whether another host can tell it the same.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `struct kvm_cpuid_entry2` (Linux, `arch/x86/include/uapi/asm/kvm.h`): what CPUID answers for a leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the registers' own names")]
pub struct CpuidEntry {
    /// Leaf: EAX before the instruction.
    pub function: u32,
    /// Subleaf: ECX before the instruction.
    pub index: u32,
    /// `KVM_CPUID_FLAG_*`: whether the subleaf counts.
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// The entries for vCPU `index` of `count`: the supported ones with this vCPU's own APIC id and topology.
///
/// Sources: Intel SDM volume 2, CPUID leaves 1, 4, 0xb and 0x1f; AMD APM volume 3, leaves 0x8000_0008 and 0x8000_001e.
pub fn for_vcpu(supported: &[CpuidEntry], index: u8, count: u8) -> Vec<CpuidEntry> {
    let id = u32::from(index);
    let shift = u32::from(count).next_power_of_two().trailing_zeros();
    let mut entries = supported.to_vec();
    for entry in &mut entries {
        match entry.function {
            0x1 => entry.ebx = (entry.ebx & 0x0000_ffff) | u32::from(count) << 16 | id << 24,
            0x4 => entry.eax = (entry.eax & !(0x3f << 26)) | (u32::from(count).saturating_sub(1) & 0x3f) << 26,
            0xb | 0x1f => {
                entry.edx = id;
                match entry.index {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                    1 => (entry.eax, entry.ebx, entry.ecx) = (shift, u32::from(count), 2 << 8 | 1),
                    level => (entry.eax, entry.ebx, entry.ecx) = (0, 0, level),
                }
            }
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | shift << 12 | u32::from(count).saturating_sub(1),
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    entries
}

/// Registers that are sets of features: a guest that was told of one may use it, so the other host must have it.
const FEATURE_REGISTERS: &[(u32, u32, Register, &str)] = &[
    (0x1, 0, Register::Ecx, "1.ecx"),
    (0x1, 0, Register::Edx, "1.edx"),
    (0x7, 0, Register::Ebx, "7.0.ebx"),
    (0x7, 0, Register::Ecx, "7.0.ecx"),
    (0x7, 0, Register::Edx, "7.0.edx"),
    (0x7, 1, Register::Eax, "7.1.eax"),
    (0xd, 0, Register::Eax, "0xd.0.eax"),
    (0xd, 1, Register::Eax, "0xd.1.eax"),
    (0x4000_0001, 0, Register::Eax, "0x40000001.eax"),
    (0x8000_0001, 0, Register::Ecx, "0x80000001.ecx"),
    (0x8000_0001, 0, Register::Edx, "0x80000001.edx"),
    (0x8000_0008, 0, Register::Ebx, "0x80000008.ebx"),
];

/// Bits of 1.ecx that say what the guest has done (OSXSAVE) or that any KVM can offer (TSC deadline, hypervisor).
const NOT_HOST_FEATURES: u32 = 1 << 27 | 1 << 24 | 1 << 31;

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &CpuidEntry) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

/// Why a guest with the CPUID `guest` cannot run on a host that supports `host`: one line a reason, none when it can.
pub fn incompatibilities(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<String> {
    let mut reasons = Vec::new();
    let host: BTreeMap<_, _> = host.iter().map(|e| ((e.function, e.index), e)).collect();
    let guest: BTreeMap<_, _> = guest.iter().map(|e| ((e.function, e.index), e)).collect();
    let vendor = |of: &BTreeMap<(u32, u32), &CpuidEntry>| {
        of.get(&(0, 0)).map(|e| vendor_name(e)).unwrap_or_else(|| "unknown".into())
    };
    if vendor(&guest) != vendor(&host) {
        reasons.push(format!("its processor is {}, this one is {}", vendor(&guest), vendor(&host)));
    }
    for &(function, index, register, name) in FEATURE_REGISTERS {
        let has = |of: &BTreeMap<(u32, u32), &CpuidEntry>| of.get(&(function, index)).map_or(0, |e| register.of(e));
        let mut missing = has(&guest) & !has(&host);
        if function == 1 && matches!(register, Register::Ecx) {
            missing &= !NOT_HOST_FEATURES;
        }
        if missing != 0 {
            reasons.push(format!("it uses CPU features {missing:#010x} of CPUID {name}, which this host lacks"));
        }
    }
    reasons
}

fn vendor_name(leaf0: &CpuidEntry) -> String {
    [leaf0.ebx, leaf0.edx, leaf0.ecx]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .filter(u8::is_ascii_graphic)
        .map(char::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<CpuidEntry> {
        let leaf = |function, ebx, ecx, edx| CpuidEntry { function, ebx, ecx, edx, ..Default::default() };
        vec![leaf(0, 0x6874_7541, 0x444d_4163, 0x6974_6e65), leaf(1, 0, 0b1011, 0xff), leaf(7, 0xf0, 0, 0)]
    }

    #[test]
    fn a_host_can_run_what_it_offers() {
        assert_eq!(incompatibilities(&for_vcpu(&host(), 1, 2), &host()), Vec::<String>::new());
    }

    #[test]
    fn a_feature_that_is_missing_is_named() {
        let mut guest = host();
        guest[2].ebx |= 1 << 16;
        let reasons = incompatibilities(&guest, &host());
        assert_eq!(reasons.len(), 1);
        assert!(reasons[0].contains("0x00010000 of CPUID 7.0.ebx"), "{reasons:?}");
    }

    #[test]
    fn what_only_the_host_has_is_no_incompatibility() {
        let mut richer = host();
        richer[1].ecx |= 0xff00;
        assert!(incompatibilities(&host(), &richer).is_empty());
    }

    #[test]
    fn another_vendor_is_refused() {
        let mut intel = host();
        (intel[0].ebx, intel[0].edx, intel[0].ecx) = (0x756e_6547, 0x4965_6e69, 0x6c65_746e);
        let reasons = incompatibilities(&intel, &host());
        assert!(reasons[0].contains("GenuineIntel") && reasons[0].contains("AuthenticAMD"), "{reasons:?}");
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        assert_eq!(for_vcpu(&host(), 1, 2)[1].ebx >> 24, 1);
        assert_eq!(for_vcpu(&host(), 1, 2)[1].ebx >> 16 & 0xff, 2);
    }
}
