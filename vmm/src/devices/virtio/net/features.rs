//! What a network interface and its driver can agree on (VIRTIO 1.2, 5.1.3), and what of it is the tap's to do.

use super::config::NetConfig;

pub(super) const CSUM: u32 = 0;
pub(super) const GUEST_CSUM: u32 = 1;
pub(super) const CTRL_GUEST_OFFLOADS: u32 = 2;
pub(super) const HAS_MTU: u32 = 3;
pub(super) const HAS_MAC: u32 = 5;
pub(super) const GUEST_TSO4: u32 = 7;
pub(super) const GUEST_TSO6: u32 = 8;
pub(super) const GUEST_ECN: u32 = 9;
const HOST_TSO4: u32 = 11;
const HOST_TSO6: u32 = 12;
const HOST_ECN: u32 = 13;
pub(super) const MRG_RXBUF: u32 = 15;
const STATUS: u32 = 16;
pub(super) const CTRL_VQ: u32 = 17;
pub(super) const GUEST_ANNOUNCE: u32 = 21;
pub(super) const MQ: u32 = 22;
pub(super) const GUEST_USO4: u32 = 54;
pub(super) const GUEST_USO6: u32 = 55;
const HOST_USO: u32 = 56;

/// What every interface offers.
const ALWAYS: [u32; 16] = [
    CSUM,
    GUEST_CSUM,
    CTRL_GUEST_OFFLOADS,
    HAS_MTU,
    HAS_MAC,
    GUEST_TSO4,
    GUEST_TSO6,
    GUEST_ECN,
    HOST_TSO4,
    HOST_TSO6,
    HOST_ECN,
    MRG_RXBUF,
    STATUS,
    CTRL_VQ,
    GUEST_ANNOUNCE,
    MQ,
];
/// What it offers where datagrams can be cut.
const UDP_SEGMENTATION: [u32; 3] = [GUEST_USO4, GUEST_USO6, HOST_USO];

/// The features that the driver may turn off and on again, each at its bit (5.1.6.5.6).
const OFFLOADS: [u32; 6] = [GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_USO4, GUEST_USO6];

fn bits(features: impl IntoIterator<Item = u32>) -> u64 {
    features.into_iter().fold(0, |bits, feature| bits | 1 << feature)
}

/// What an interface of this description offers.
pub(super) fn offered(config: &NetConfig) -> u64 {
    let is_offered = |feature: &u32| *feature != MQ || config.pairs > 1;
    let udp = if config.udp_segmentation { bits(UDP_SEGMENTATION) } else { 0 };
    bits(ALWAYS.into_iter().filter(is_offered)) | udp
}

/// Those of the features that the driver may turn off and on again.
pub(super) fn offloads_of(features: u64) -> u64 {
    features & bits(OFFLOADS)
}

/// What the tap does not do before a frame is read, since the driver takes it as it is (include/uapi/linux/if_tun.h, `TUN_F_CSUM` and
/// the like).
pub(super) fn tap_offload(offloads: u64) -> u32 {
    let has = |feature: u32| offloads >> feature & 1 == 1;
    // The kernel refuses everything else without it.
    if !has(GUEST_CSUM) {
        return 0;
    }
    let bit = |is_on: bool, bits: u32| if is_on { bits } else { 0 };
    let has_tso = has(GUEST_TSO4) || has(GUEST_TSO6);
    libc::TUN_F_CSUM
        | bit(has(GUEST_TSO4), libc::TUN_F_TSO4)
        | bit(has(GUEST_TSO6), libc::TUN_F_TSO6)
        | bit(has(GUEST_ECN) && has_tso, libc::TUN_F_TSO_ECN)
        // The kernel has one switch for both.
        | bit(has(GUEST_USO4) && has(GUEST_USO6), libc::TUN_F_USO4 | libc::TUN_F_USO6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_is_asked_for_no_more_than_the_driver_takes() {
        assert_eq!(tap_offload(0), 0);
        assert_eq!(tap_offload(bits([GUEST_TSO4, GUEST_TSO6])), 0, "the kernel refuses it without checksums");
        assert_eq!(tap_offload(bits([GUEST_CSUM, GUEST_ECN])), libc::TUN_F_CSUM);
        assert_eq!(tap_offload(bits([GUEST_CSUM, GUEST_TSO6])), libc::TUN_F_CSUM | libc::TUN_F_TSO6);
        assert_eq!(tap_offload(bits([GUEST_CSUM, GUEST_USO4])), libc::TUN_F_CSUM);
        assert_eq!(tap_offload(bits(OFFLOADS)), 0x6f);
    }

    #[test]
    fn what_the_host_has_not_is_not_offered() {
        let config = NetConfig { mac: [2; 6].into(), mtu: 1500, pairs: 1, udp_segmentation: false };
        let small = offered(&config);
        assert_eq!(small & bits(UDP_SEGMENTATION) | small & bits([MQ]), 0);
        let large = offered(&NetConfig { pairs: 2, udp_segmentation: true, ..config });
        assert_eq!(large, small | bits(UDP_SEGMENTATION) | bits([MQ]));
    }
}
