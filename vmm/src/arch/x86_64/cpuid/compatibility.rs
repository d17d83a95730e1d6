//! Whether a guest that has been told of one processor can run on another.

use std::collections::BTreeSet;

use super::features::{
    AVX10_EBX, EXTENDED_ECX, LEAF1_ECX, LEAF1_EDX, LEAF7_ECX, Place, Register, SETS, SIZES_EAX, TILE_PALETTES_EAX,
    XCR0_EAX, named,
};
use super::{CMP_LEGACY, CpuidEntry, HTT};

/// Bits that say nothing of the host: what the guest has done (OSXSAVE, OSPKE), and how many processors it has (HTT, CmpLegacy).
const NOT_HOST_FEATURES: &[(Place, u32)] =
    &[(LEAF1_ECX, 1 << 27), (LEAF1_EDX, HTT), (LEAF7_ECX, 1 << 4), (EXTENDED_ECX, CMP_LEGACY)];

/// Fields that are numbers, of which a host must have at least as much: their place, the number of their lowest bit, how many bits
/// they have, and what they are.
///
/// A host with more physical address bits than the guest was told of does not fault where the guest's processor would have, on bits
/// of page tables that were reserved there; no kernel relies on that.
const AT_MOST: &[(Place, u32, u32, &str)] = &[
    (SIZES_EAX, 0, 8, "physical address bits"),
    (SIZES_EAX, 8, 8, "linear address bits"),
    (TILE_PALETTES_EAX, 0, 32, "as its last AMX palette"),
    (AVX10_EBX, 0, 8, "as its version of AVX10"),
];

/// Leaves that say how state is laid out, where a host's own layout is what its processor uses: the same or none.
const TILES: u32 = 0x1d;
const EXTENDED_STATE: u32 = 0xd;
/// The first component of extended state that has a subleaf (Intel SDM volume 1, section 13.2).
const FIRST_COMPONENT: u32 = 2;

/// Why a guest with the CPUID `guest` cannot run on a host that supports `host`: one line a reason, none when it can.
pub fn incompatibilities(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<String> {
    let mut reasons = Vec::new();
    let mut seen = BTreeSet::new();
    if let Some(twice) = guest.iter().find(|entry| !seen.insert((entry.function, entry.index))) {
        reasons.push(format!("its description has CPUID leaf {:#x}.{} twice", twice.function, twice.index));
    }
    if vendor(guest) != vendor(host) {
        reasons.push(format!("its processor is {}, this one is {}", vendor(guest), vendor(host)));
    }
    let missing: Vec<_> = SETS.iter().flat_map(|(place, _)| missing(*place, guest, host)).collect();
    if !missing.is_empty() {
        reasons.push(format!("it uses CPU features that this host lacks: {}", missing.join(", ")));
    }
    reasons.extend(AT_MOST.iter().filter_map(|field| too_large(field, guest, host)));
    reasons.extend(other_layouts(guest, host));
    reasons
}

/// Whether a processor has the feature of this name, as `/proc/cpuinfo` has it.
pub fn has_feature(entries: &[CpuidEntry], name: &str) -> bool {
    let place = SETS.iter().find_map(|(place, names)| {
        let (bit, _) = names.iter().find(|(_, other)| *other == name)?;
        Some((place, bit))
    });
    place.is_some_and(|(place, bit)| place.find(entries) >> bit & 1 == 1)
}

/// The features of one register that the guest has and the host has not, by name.
fn missing(place: Place, guest: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<String> {
    let not_features = NOT_HOST_FEATURES.iter().filter(|(other, _)| *other == place);
    let missing = place.find(guest) & !place.find(host);
    // The low bits of AVX10's register are a number.
    let missing = if place == AVX10_EBX { missing & !0xff } else { missing };
    named(place, not_features.fold(missing, |missing, (_, bits)| missing & !bits))
}

fn too_large(field: &(Place, u32, u32, &str), guest: &[CpuidEntry], host: &[CpuidEntry]) -> Option<String> {
    let (place, shift, bits, what) = *field;
    let number = |of: &[CpuidEntry]| (u64::from(place.find(of)) >> shift) & ((1 << bits) - 1);
    let (guest, host) = (number(guest), number(host));
    (guest > host).then(|| format!("it was told of {guest} {what}, this host has {host}"))
}

/// Where components of extended state or tiles are laid out otherwise than the guest was told.
fn other_layouts(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<String> {
    let in_use =
        u64::from(XCR0_EAX.find(guest)) | u64::from(Place { register: Register::Edx, ..XCR0_EAX }.find(guest)) << 32;
    let find = |of: &[CpuidEntry], like: &CpuidEntry| {
        of.iter().find(|entry| (entry.function, entry.index) == (like.function, like.index)).copied()
    };
    let mut reasons = Vec::new();
    for entry in guest {
        let host = find(host, entry).unwrap_or_default();
        let is_used = (FIRST_COMPONENT..64).contains(&entry.index) && in_use >> entry.index & 1 == 1;
        if entry.function == EXTENDED_STATE && is_used && (entry.eax, entry.ebx) != (host.eax, host.ebx) {
            reasons.push(format!(
                "it keeps component {} of extended state, of {} bytes, at byte {}; this host has {} bytes at byte {}",
                entry.index, entry.eax, entry.ebx, host.eax, host.ebx
            ));
        }
        if entry.function == TILES
            && entry.index > 0
            && (entry.eax, entry.ebx, entry.ecx) != (host.eax, host.ebx, host.ecx)
        {
            reasons.push(format!("AMX palette {} is another one on this host", entry.index));
        }
    }
    reasons
}

/// The name that leaf 0 has of who made the processor, such as `AuthenticAMD`.
pub fn vendor(entries: &[CpuidEntry]) -> String {
    let leaf0 = entries.iter().find(|entry| (entry.function, entry.index) == (0, 0));
    leaf0.map_or_else(|| "unknown".into(), vendor_name)
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
    use proptest::prelude::*;

    use super::super::features::LEAF7_EDX;
    use super::super::testing::{host, rich_host};
    use super::super::{for_vcpu, offered};
    use super::*;

    fn with(entries: &[CpuidEntry], place: Place, bits: u32) -> Vec<CpuidEntry> {
        let mut entries = entries.to_vec();
        match entries.iter_mut().find(|entry| place.is_of(entry)) {
            Some(entry) => place.set(entry, place.get(entry) | bits),
            None => {
                let mut entry = CpuidEntry { function: place.function, index: place.index, ..Default::default() };
                place.set(&mut entry, bits);
                entries.push(entry);
            }
        }
        entries
    }

    #[test]
    fn a_host_can_run_what_it_offers() {
        assert_eq!(incompatibilities(&for_vcpu(&host(), 1, 2), &host()), Vec::<String>::new());
        assert_eq!(incompatibilities(&for_vcpu(&rich_host(), 0, 4), &rich_host()), Vec::<String>::new());
    }

    #[test]
    fn every_feature_of_every_set_is_compared() {
        for (place, _) in SETS {
            let lowest = if *place == AVX10_EBX { 16 } else { 0 };
            for bit in lowest..32 {
                let is_compared = !NOT_HOST_FEATURES.contains(&(*place, 1 << bit));
                let reasons = incompatibilities(&with(&host(), *place, 1 << bit), &with(&host(), *place, 0));
                let had_it = place.find(&host()) >> bit & 1 == 1;
                assert_eq!(reasons.len(), usize::from(is_compared && !had_it), "{place} bit {bit}: {reasons:?}");
                assert!(reasons.iter().all(|reason| reason.contains(&named(*place, 1 << bit)[0])), "{reasons:?}");
                assert!(incompatibilities(&host(), &with(&host(), *place, 1 << bit)).is_empty(), "more is no harm");
            }
        }
    }

    #[test]
    fn what_no_guest_here_has_is_refused_by_name() {
        for (place, bit, name) in
            [(LEAF1_ECX, 5, "vmx"), (EXTENDED_ECX, 2, "svm"), (LEAF1_ECX, 15, "pdcm"), (LEAF7_ECX, 7, "user_shstk")]
        {
            let has_it = with(&host(), place, 1 << bit);
            let reasons = incompatibilities(&has_it, &offered(&has_it));
            assert!(matches!(&reasons[..], [one] if one.contains(name)), "{reasons:?}");
        }
    }

    #[test]
    fn numbers_may_be_smaller_and_not_larger() {
        let bits = |physical: u32, linear: u32| with(&host(), SIZES_EAX, physical | linear << 8);
        assert!(incompatibilities(&bits(39, 48), &bits(46, 57)).is_empty());
        let reasons = incompatibilities(&bits(46, 57), &bits(39, 48));
        assert!(reasons[0].contains("46 physical address bits, this host has 39"), "{reasons:?}");
        assert!(reasons[1].contains("57 linear address bits, this host has 48"), "{reasons:?}");
        let avx10 = |version: u32| with(&host(), AVX10_EBX, version | 7 << 16);
        assert!(incompatibilities(&avx10(1), &avx10(2)).is_empty());
        assert_eq!(incompatibilities(&avx10(2), &avx10(1)).len(), 1);
    }

    #[test]
    fn extended_state_is_where_the_guest_was_told() {
        let component = |index, eax, ebx| CpuidEntry { function: 0xd, index, eax, ebx, flags: 1, ..Default::default() };
        let layout = |offset| [&with(&host(), XCR0_EAX, 1 << 9 | 3)[..], &[component(9, 8, offset)]].concat();
        assert!(incompatibilities(&layout(0x980), &layout(0x980)).is_empty());
        let reasons = incompatibilities(&layout(0x980), &layout(0xa80));
        assert!(reasons[0].contains("component 9") && reasons[0].contains("2432"), "{reasons:?}");
        // One that is not in use may be anywhere.
        let unused = [&host()[..], &[component(9, 8, 0x980)]].concat();
        assert!(incompatibilities(&unused, &host()).is_empty());
    }

    #[test]
    fn features_are_asked_for_by_name() {
        assert!(!has_feature(&host(), "arch_capabilities"));
        assert!(has_feature(&with(&host(), LEAF7_EDX, 1 << 29), "arch_capabilities"));
        assert!(!has_feature(&host(), "no feature"));
    }

    #[test]
    fn another_vendor_is_refused() {
        let mut intel = host();
        (intel[0].ebx, intel[0].edx, intel[0].ecx) = (0x756e_6547, 0x4965_6e69, 0x6c65_746e);
        let reasons = incompatibilities(&intel, &host());
        assert!(reasons[0].contains("GenuineIntel") && reasons[0].contains("AuthenticAMD"), "{reasons:?}");
    }

    #[test]
    fn a_leaf_that_is_there_twice_is_refused() {
        let twice = [&host()[..], &host()[1..2]].concat();
        assert_eq!(incompatibilities(&twice, &host()), ["its description has CPUID leaf 0x1.0 twice"]);
    }

    fn entries() -> impl Strategy<Value = Vec<CpuidEntry>> {
        let leaf = prop_oneof![0_u32..0x20, 0x8000_0000_u32..0x8000_0023, any::<u32>()];
        let entry = (leaf, prop_oneof![0_u32..4, any::<u32>()], any::<[u32; 5]>()).prop_map(
            |(function, index, [flags, eax, ebx, ecx, edx])| CpuidEntry { function, index, flags, eax, ebx, ecx, edx },
        );
        prop::collection::vec(entry, 0..40)
    }

    proptest! {
        #[test]
        fn any_description_gets_an_answer(guest in entries(), host in entries()) {
            let _ = incompatibilities(&guest, &host);
            let _ = incompatibilities(&guest, &offered(&host));
            for (index, count) in [(0, 0), (0, 1), (254, 255)] {
                let _ = for_vcpu(&guest, index, count);
            }
        }
    }
}
