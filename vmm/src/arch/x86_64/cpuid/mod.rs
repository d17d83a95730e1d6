//! CPUID: what a guest is told, and whether another host can tell it the same.
//!
//! | to read about | open |
//! |---|---|
//! | which bit is which feature | `features.rs` |
//! | what KVM supports and no guest is told of | `offered.rs` |
//! | what hosts that differ have in common | `model.rs` |
//! | why a guest cannot run on another host | `compatibility.rs` |

mod compatibility;
mod features;
mod model;
mod offered;

pub use compatibility::{has_feature, incompatibilities, vendor};
pub use model::{CpuModel, Level, ModelError};
pub use offered::offered;

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

/// The entries for vCPU `index` of `count`: the supported ones with this vCPU's own APIC id, which is its number, and the
/// machine's topology: one package, of `count` cores with one thread each, that share the last cache.
///
/// Sources: Intel SDM volume 2, CPUID leaves 1, 4, 0xb and 0x1f; AMD APM volume 3, leaves 0x8000_0001, 0x8000_0008,
/// 0x8000_001d and 0x8000_001e.
pub fn for_vcpu(supported: &[CpuidEntry], index: u8, count: u8) -> Vec<CpuidEntry> {
    let (id, count) = (u32::from(index), u32::from(count.max(1)));
    let shift = id_bits(count);
    let has_extended_topology = supported.iter().any(|entry| entry.function == 0x8000_001e);
    let mut entries: Vec<_> = supported.iter().filter(|entry| !is_topology(entry.function)).copied().collect();
    for leaf in [0xb, 0x1f].into_iter().filter(|leaf| supported.iter().any(|entry| entry.function == *leaf)) {
        entries.extend(topology(leaf, id, count));
    }
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | count.min(0xff) << 16 | id << 24;
                entry.edx = with_bit(entry.edx, HTT, count > 1);
            }
            0x4 => entry.eax = shared_by(entry.eax, count) & !(0x3f << 26) | (count - 1).min(0x3f) << 26,
            0x8000_0001 => entry.ecx = with_bit(entry.ecx, CMP_LEGACY, count > 1 && has_extended_topology),
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | shift << 12 | (count - 1),
            0x8000_001d => entry.eax = shared_by(entry.eax, count),
            // Core and node: one thread a core, one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    entries
}

/// Bits of 1.ecx: there is a hypervisor; the local APIC's timer takes a TSC deadline.
pub const HYPERVISOR: u32 = 1 << 31;
/// As [`HYPERVISOR`].
pub const TSC_DEADLINE: u32 = 1 << 24;
/// The leaf whose eax says what KVM offers (Linux, Documentation/virt/kvm/x86/cpuid.rst), and bits of it: the clock.
pub const KVM_FEATURES: u32 = 0x4000_0001;
/// As [`KVM_FEATURES`].
pub const KVM_CLOCKSOURCE2: u32 = 1 << 3;
/// Page faults that a guest need not wait for.
pub const KVM_ASYNC_PF: u32 = 1 << 4;
/// The time for which a vCPU had no CPU.
pub const KVM_STEAL_TIME: u32 = 1 << 5;
/// That a page is there is told by an interrupt: Linux guests from 5.9 on know no other way.
pub const KVM_ASYNC_PF_INT: u32 = 1 << 14;
/// `HTT` in 1.edx: the count of processors in 1.ebx means something.
const HTT: u32 = 1 << 28;
/// `CmpLegacy` in 0x8000_0001.ecx, of AMD: they are cores and not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX` (Linux, `arch/x86/include/uapi/asm/kvm.h`): the subleaf counts.
const SUBLEAF: u32 = 1;

fn with_bit(register: u32, bit: u32, set: bool) -> u32 {
    if set { register | bit } else { register & !bit }
}

/// Whether a leaf says nothing but where a processor is.
fn is_topology(leaf: u32) -> bool {
    matches!(leaf, 0xb | 0x1f)
}

/// How many bits of an APIC id tell cores apart.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Leaf 0xb or 0x1f: threads, of which a core has one, then cores, then the end.
fn topology(leaf: u32, id: u32, count: u32) -> [CpuidEntry; 3] {
    let level = |index, eax, ebx, kind: u32| CpuidEntry {
        function: leaf,
        index,
        flags: SUBLEAF,
        eax,
        ebx,
        ecx: kind << 8 | index,
        edx: id,
    };
    [level(0, 0, 1, 1), level(1, id_bits(count), count, 2), level(2, 0, 0, 0)]
}

/// Leaf 4 or 0x8000_001d, eax, of a cache: the third level is everybody's, the others a core's own.
fn shared_by(eax: u32, count: u32) -> u32 {
    let sharing = if eax >> 5 & 7 >= 3 { (1 << id_bits(count)) - 1 } else { 0 };
    eax & !(0xfff << 14) | sharing << 14
}

#[cfg(test)]
mod testing {
    use super::{CpuidEntry, SUBLEAF};

    /// A host with few features.
    pub(super) fn host() -> Vec<CpuidEntry> {
        let leaf = |function, ebx, ecx, edx| CpuidEntry { function, ebx, ecx, edx, ..Default::default() };
        vec![leaf(0, 0x6874_7541, 0x444d_4163, 0x6974_6e65), leaf(1, 0, 0b1011, 0xff), leaf(7, 0xf0, 0, 0)]
    }

    /// A host with all leaves of topology, as KVM gives them: one subleaf each of 0xb and 0x1f.
    pub(super) fn rich_host() -> Vec<CpuidEntry> {
        let leaf = |function, index, eax| CpuidEntry { function, index, eax, flags: SUBLEAF, ..Default::default() };
        let caches =
            [(0, 0x21), (1, 0x43), (2, 0x63)].map(|(index, eax)| [leaf(4, index, eax), leaf(0x8000_001d, index, eax)]);
        let others = [0xb, 0x1f, 0x8000_0001, 0x8000_0008, 0x8000_001e].map(|function| leaf(function, 0, 0));
        [&host()[..], caches.as_flattened(), &others].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{host, rich_host};
    use super::*;

    fn find(entries: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
        let mut all = entries.iter().filter(|entry| (entry.function, entry.index) == (function, index));
        let found = *all.next().unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
        assert!(all.next().is_none(), "leaf {function:#x}.{index} twice");
        found
    }

    /// What a kernel computes from each leaf must be the same: Linux, `arch/x86/kernel/cpu/topology*.c`.
    #[test]
    fn every_leaf_tells_the_same_topology() {
        for count in [1, 2, 3, 4, 5, 8, 16, 17, 64, 128, 255_u8] {
            let bits = u32::from(count).next_power_of_two().trailing_zeros();
            for index in [0, count / 2, count - 1] {
                let entries = for_vcpu(&rich_host(), index, count);
                assert_eq!(for_vcpu(&entries, index, count), entries, "it changes what it has made");
                let (id, all) = (u32::from(index), u32::from(count));
                let leaf1 = find(&entries, 1, 0);
                assert_eq!((leaf1.ebx >> 24, leaf1.ebx >> 16 & 0xff), (id, all));
                assert_eq!(leaf1.edx & HTT != 0, count > 1);
                for leaf in [0xb, 0x1f] {
                    let [threads, cores, end] = [0, 1, 2].map(|level| find(&entries, leaf, level));
                    assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
                    assert_eq!((cores.eax, cores.ebx, cores.ecx), (bits, all, 0x201));
                    assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
                    assert!([threads, cores, end].iter().all(|level| level.edx == id));
                }
                let extended = find(&entries, 0x8000_0008, 0).ecx;
                assert_eq!((extended >> 12 & 0xf, extended & 0xff), (bits, all - 1));
                assert_eq!(find(&entries, 0x8000_001e, 0).ebx >> 8 & 0xff, 0, "more than a thread a core");
                for leaf in [4, 0x8000_001d] {
                    let sharing = |index| (find(&entries, leaf, index).eax >> 14 & 0xfff) + 1;
                    assert_eq!((sharing(0), sharing(1), sharing(2)), (1, 1, 1 << bits));
                }
            }
        }
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        assert_eq!(for_vcpu(&host(), 1, 2)[1].ebx >> 24, 1);
        assert_eq!(for_vcpu(&host(), 1, 2)[1].ebx >> 16 & 0xff, 2);
    }
}
