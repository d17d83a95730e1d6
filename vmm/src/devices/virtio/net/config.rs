//! What the guest sees of a network interface. It travels.

use std::fmt;
use std::io;
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

/// The least and the most bytes of a packet that an interface can be described with (VIRTIO 1.2, 5.1.4.1; Linux, `ETH_MIN_MTU`).
pub const MTU: std::ops::RangeInclusive<u16> = 68..=u16::MAX;
/// The most pairs of queues; a vector each and one descriptor of the tap.
pub const MAX_PAIRS: u16 = 16;

/// The address of an interface, of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacAddress([u8; 6]);

/// Why a text is no address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six bytes.
    #[error("an address has six bytes of two hexadecimal digits with colons between them, such as 52:54:00:12:34:56")]
    Malformed,
    /// Of many stations.
    #[error(
        "this is a multicast address (its first byte is odd); an interface has a unicast one, such as 52:54:00:12:34:56"
    )]
    Multicast,
    /// Of none.
    #[error("the address of zeros is nobody's; leave mac out for one at random")]
    Zero,
}

impl MacAddress {
    /// An address that the host's administrator gives (its locally administered bit is set), at random, with the prefix that
    /// monitors use.
    ///
    /// # Errors
    /// When the host has no randomness.
    pub fn random() -> io::Result<Self> {
        let mut address = [0x52, 0x54, 0, 0, 0, 0];
        let count = getrandom(&mut address[3..], GetRandomFlags::empty())?;
        // So few bytes come whole (getrandom(2)).
        if count == 3 { Ok(Self(address)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Its bytes, in the order of a frame.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// This address, if an interface can have it.
    ///
    /// # Errors
    /// When it is of no or of many stations.
    pub fn checked(self) -> Result<Self, MacError> {
        match self.0 {
            [0, 0, 0, 0, 0, 0] => Err(MacError::Zero),
            [first, ..] if first & 1 == 1 => Err(MacError::Multicast),
            _ => Ok(self),
        }
    }
}

impl From<[u8; 6]> for MacAddress {
    fn from(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let byte = |part: &str| {
            let is_hex = part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit());
            is_hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(MacError::Malformed)?;
        Self(bytes).checked()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What the guest sees of a network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its address.
    pub mac: MacAddress,
    /// Most bytes of a packet, without its Ethernet header.
    pub mtu: u16,
    /// Pairs of queues, one for each direction.
    pub pairs: u16,
    /// Whether datagrams of UDP may be cut into packets by the other side, for which the host's kernel has to be 6.2 or later.
    pub udp_segmentation: bool,
}

impl NetConfig {
    /// What is wrong with it, if anything: it may come from elsewhere.
    pub(super) fn why_not(&self) -> Option<String> {
        if let Err(e) = self.mac.checked() {
            return Some(format!("{}: {e}", self.mac));
        }
        if !MTU.contains(&self.mtu) {
            return Some(format!("an MTU of {} bytes is none: {} to {}", self.mtu, MTU.start(), MTU.end()));
        }
        let is_possible = (1..=MAX_PAIRS).contains(&self.pairs);
        (!is_possible).then(|| format!("{} pairs of queues are not possible: 1 to {MAX_PAIRS}", self.pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_written() {
        let address: MacAddress = "52:54:00:aB:cd:0f".parse().unwrap();
        assert_eq!(address.to_string(), "52:54:00:ab:cd:0f");
        for (text, why) in [
            ("", MacError::Malformed),
            ("52:54:00:12:34", MacError::Malformed),
            ("52:54:00:12:34:56:78", MacError::Malformed),
            ("52:54:00:12:34:5", MacError::Malformed),
            ("52-54-00-12-34-56", MacError::Malformed),
            ("52:54:00:12:34:+6", MacError::Malformed),
            ("01:00:5e:00:00:01", MacError::Multicast),
            ("ff:ff:ff:ff:ff:ff", MacError::Multicast),
            ("00:00:00:00:00:00", MacError::Zero),
        ] {
            assert_eq!(text.parse::<MacAddress>(), Err(why), "{text}");
        }
    }

    #[test]
    fn an_address_at_random_is_of_one_station_and_locally_administered() {
        let [first, second] = [MacAddress::random().unwrap(), MacAddress::random().unwrap()];
        assert_eq!(first.checked(), Ok(first));
        assert_eq!(first.bytes()[0] & 3, 2);
        assert_ne!(first, second);
    }

    #[test]
    fn what_no_interface_can_be_is_told() {
        let good = NetConfig { mac: [2, 0, 0, 0, 0, 1].into(), mtu: 1500, pairs: 1, udp_segmentation: false };
        assert_eq!(good.why_not(), None);
        for wrong in [
            NetConfig { mac: [1; 6].into(), ..good },
            NetConfig { mtu: 67, ..good },
            NetConfig { pairs: 0, ..good },
            NetConfig { pairs: MAX_PAIRS + 1, ..good },
        ] {
            assert!(wrong.why_not().is_some(), "{wrong:?}");
        }
    }
}
