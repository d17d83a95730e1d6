//! How a user asks for a network interface: `--net tap=NAME|fd=N[,mac=MAC][,mtu=N][,queues=N][,id=ID]`.

use std::str::FromStr;
use std::sync::Arc;

use super::config::{MAX_PAIRS, MTU, MacAddress, NetConfig};
use super::tap::{Tap, TapError, TapSource};
use crate::key_value::{KeyValueError, KeyValues};
use crate::record::{Name, RecordError};

/// What can be said of one.
const KEYS: [&str; 6] = ["tap", "fd", "mac", "mtu", "queues", "id"];

/// Why there can be no such interface.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// What is written makes no sense.
    #[error(transparent)]
    Syntax(#[from] KeyValueError),
    /// Nothing is the other end.
    #[error("say which tap: tap=NAME, or fd=N for one that is open")]
    NoTap,
    /// Two things are.
    #[error("say either tap=NAME or fd=N")]
    TwoTaps,
    /// No such MTU.
    #[error("an MTU of {0} bytes is not possible: {least} to {most}", least = MTU.start(), most = MTU.end())]
    Mtu(u32),
    /// No such number of queues.
    #[error("{0} pairs of queues are not possible: 1 to {MAX_PAIRS}")]
    Queues(u16),
    /// No such name.
    #[error(transparent)]
    Id(#[from] RecordError),
    /// No such tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// No address.
    #[error("there is no randomness for an address: {cause}; say mac=…")]
    NoRandomness {
        /// What the host said.
        cause: std::io::Error,
    },
}

/// A network interface as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// Its name among the machine's devices, if it has one of its own.
    pub id: Option<Name>,
    /// The other end.
    pub tap: TapSource,
    /// Its address; one at random otherwise.
    pub mac: Option<MacAddress>,
    /// Most bytes of a packet; those of the tap otherwise.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub queues: u16,
}

/// What this host gives for a network interface, and what it asks of the guest's.
#[derive(Clone, Debug)]
pub struct NetBackend {
    /// The other end.
    pub tap: Arc<Tap>,
    /// The only address that it may have, if one was said.
    pub mac: Option<MacAddress>,
    /// The only MTU, likewise.
    pub mtu: Option<u16>,
}

impl From<Arc<Tap>> for NetBackend {
    fn from(tap: Arc<Tap>) -> Self {
        Self { tap, mac: None, mtu: None }
    }
}

impl NetBackend {
    /// Why it cannot be the other end of an interface like this: the end of a sentence.
    pub(super) fn why_not(&self, config: &NetConfig) -> Option<String> {
        if let Some(mac) = self.mac.filter(|mac| *mac != config.mac) {
            let guest = config.mac;
            return Some(format!(
                "the guest's has the address {guest}, and {mac} is asked for here; leave mac out, or say mac={guest}"
            ));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu != config.mtu) {
            let guest = config.mtu;
            return Some(format!(
                "the guest's has an MTU of {guest} bytes, and {mtu} is asked for here; leave mtu out, or say mtu={guest}"
            ));
        }
        self.tap.why_not(config)
    }
}

impl FromStr for NetOptions {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let values = KeyValues::parse(text, &KEYS)?;
        let tap = match (values.text("tap")?, values.parsed("fd")?) {
            (Some(name), None) => TapSource::Name(name.into()),
            (None, Some(number)) => TapSource::Descriptor(number),
            (None, None) => return Err(NetError::NoTap),
            (Some(_), Some(_)) => return Err(NetError::TwoTaps),
        };
        let mtu = |mtu: u32| u16::try_from(mtu).ok().filter(|mtu| MTU.contains(mtu)).ok_or(NetError::Mtu(mtu));
        let queues = values.parsed("queues")?.unwrap_or(1);
        if !(1..=MAX_PAIRS).contains(&queues) {
            return Err(NetError::Queues(queues));
        }
        Ok(Self {
            id: values.text("id")?.map(Name::try_from).transpose()?,
            tap,
            mac: values.parsed("mac")?,
            mtu: values.parsed("mtu")?.map(mtu).transpose()?,
            queues,
        })
    }
}

impl NetOptions {
    /// Opens the other end.
    ///
    /// # Errors
    /// When there is no such tap, it cannot be used, or it has another MTU.
    pub fn open(&self) -> Result<Arc<Tap>, NetError> {
        let tap = Tap::open(&self.tap, self.queues)?;
        match self.mtu {
            Some(asked) if u32::from(asked) != tap.mtu() => {
                Err(TapError::Mtu { name: tap.name().into(), tap: tap.mtu(), asked }.into())
            }
            _ => Ok(Arc::new(tap)),
        }
    }

    /// What a new guest sees of it. An address at random is another one each time.
    ///
    /// # Errors
    /// When the host has no randomness.
    pub fn config(&self, tap: &Tap) -> Result<NetConfig, NetError> {
        let random = || MacAddress::random().map_err(|cause| NetError::NoRandomness { cause });
        let most = u32::from(*MTU.end());
        Ok(NetConfig {
            mac: self.mac.map_or_else(random, Ok)?,
            mtu: self.mtu.unwrap_or(tap.mtu().min(most) as u16),
            pairs: self.queues,
            udp_segmentation: tap.has_udp_segmentation(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_read() {
        let options: NetOptions = "tap=tap0,mac=52:54:00:00:00:01,mtu=9000,queues=4,id=net7".parse().unwrap();
        assert_eq!(options.tap, TapSource::Name("tap0".into()));
        assert_eq!((options.mtu, options.queues), (Some(9000), 4));
        assert_eq!(options.id.unwrap().as_str(), "net7");
        assert_eq!(options.mac.unwrap().to_string(), "52:54:00:00:00:01");
        let options: NetOptions = "fd=3".parse().unwrap();
        assert_eq!((options.tap, options.mac, options.queues), (TapSource::Descriptor(3), None, 1));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_to_do() {
        for (text, words) in [
            ("", "tap=NAME"),
            ("tap=", "tap=…"),
            ("tap=a,fd=3", "either"),
            ("fd=x", "fd=x"),
            ("tap=a,mtu=67", "68 to 65535"),
            ("tap=a,mtu=65536", "68 to 65535"),
            ("tap=a,queues=0", "1 to 16"),
            ("tap=a,queues=17", "1 to 16"),
            ("tap=a,mac=01:00:00:00:00:00", "multicast"),
            ("tap=a,mac=1", "six bytes"),
            ("tap=a,tap=b", "twice"),
            ("tap=a,script=no", "script"),
        ] {
            let why = text.parse::<NetOptions>().unwrap_err().to_string();
            assert!(why.contains(words), "{text}: {why}");
        }
    }
}
