//! What every device is, and what the rest of the monitor may ask of it.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::StopReason;
use crate::bounded::at_most;
use crate::record::{Name, Record, RecordError};

/// Most bytes of what the guest sees of one device.
const MAX_CONFIG: usize = 4096;

/// A device as the guest sees it: what another host must be able to make. It travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// Which one, such as `serial0`.
    pub id: Name,
    /// What it is, such as `serial-16550a`.
    pub kind: Name,
    /// The version of what it saves.
    pub version: u16,
    /// Virtio's feature bits that it offers its driver, which may have accepted them; 0 before it is made, and for what is no virtio
    /// device.
    pub features: u64,
    /// What else the guest sees of it, such as a disk's size: postcard of a type of the kind's own.
    #[serde(deserialize_with = "at_most::<_, _, MAX_CONFIG>")]
    pub config: Vec<u8>,
}

impl DeviceDescription {
    /// What the guest sees of a device of this kind.
    ///
    /// # Errors
    /// When the bytes are not of such a type, whole and alone.
    pub fn config<T: DeserializeOwned>(&self) -> Result<T, DeviceError> {
        let wrong = |why: String| DeviceError::Config { id: self.id.clone(), kind: self.kind.clone(), why };
        let (config, rest) = postcard::take_from_bytes(&self.config).map_err(|e| wrong(e.to_string()))?;
        if rest.is_empty() { Ok(config) } else { Err(wrong(format!("{} bytes too many", rest.len()))) }
    }

    /// What a device of this kind has saved inside the record of its transport.
    ///
    /// # Errors
    /// When the bytes are not of such a type, whole and alone.
    pub fn saved<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, DeviceError> {
        let (saved, rest) = postcard::take_from_bytes(bytes).map_err(|e| self.bad_state(e.to_string()))?;
        if rest.is_empty() { Ok(saved) } else { Err(self.bad_state(format!("{} bytes too many", rest.len()))) }
    }

    /// What it has saved makes no sense, and why: the end of a sentence.
    pub fn bad_state(&self, why: String) -> DeviceError {
        let (id, kind) = (self.id.clone(), self.kind.clone());
        DeviceError::State(RecordError::Bytes { id, kind, version: self.version, why })
    }

    /// The host refuses what the device takes.
    pub fn refused(&self, cause: io::Error) -> DeviceError {
        DeviceError::Host { id: self.id.clone(), cause }
    }

    /// The same device, which can offer its driver these features: it offers those that it has where it comes from.
    ///
    /// # Errors
    /// When it has some there that it has not here.
    pub fn with_features(self, possible: u64) -> Result<Self, DeviceError> {
        match (self.features, self.features & !possible) {
            (0, _) => Ok(Self { features: possible, ..self }),
            (_, 0) => Ok(self),
            (_, missing) => Err(DeviceError::Features { id: self.id, kind: self.kind, missing }),
        }
    }

    /// The same device with this to be seen of it.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub fn with_config<T: Serialize>(self, config: &T) -> Result<Self, DeviceError> {
        let wrong = |why: String| DeviceError::Config { id: self.id.clone(), kind: self.kind.clone(), why };
        let config = postcard::to_stdvec(config).map_err(|e| wrong(e.to_string()))?;
        if config.len() > MAX_CONFIG {
            return Err(wrong(format!("it has {} bytes, {MAX_CONFIG} are possible", config.len())));
        }
        Ok(Self { config, ..self })
    }
}

/// Why a device cannot be made, stopped or set up as it was.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// This program has no such device.
    #[error(
        "the machine has a device '{id}' of kind '{kind}' with state of version {version}, which this program does not know"
    )]
    Unknown {
        /// Which one.
        id: Name,
        /// What it would be.
        kind: Name,
        /// The version of what it saves.
        version: u16,
    },
    /// Two devices have one name.
    #[error("two devices are named '{0}'")]
    Twice(Name),
    /// Two devices answer at the same place.
    #[error("the devices '{first}' and '{second}' both answer at {space} {start:#x} to {end:#x}")]
    Overlap {
        /// The one at the lower address.
        first: Name,
        /// The other.
        second: Name,
        /// `port` or `address`.
        space: &'static str,
        /// First port or address that both have.
        start: u64,
        /// First behind those.
        end: u64,
    },
    /// A device answers nowhere.
    #[error("the device '{id}' has {space} {start:#x} to {end:#x}, which are none")]
    NoRange {
        /// Which one.
        id: Name,
        /// `port` or `address`.
        space: &'static str,
        /// Where it would begin.
        start: u64,
        /// Where it would end.
        end: u64,
    },
    /// What the guest is to see of a device makes no sense.
    #[error("the description of the device '{id}' makes no sense for a '{kind}': {why}")]
    Config {
        /// Which one.
        id: Name,
        /// What it is.
        kind: Name,
        /// What is wrong.
        why: String,
    },
    /// Its driver may have accepted what there is not here.
    #[error(
        "the device '{id}' of kind '{kind}' has offered its driver features {missing:#x} of virtio, which it cannot have here; use the same release on both hosts"
    )]
    Features {
        /// Which one.
        id: Name,
        /// What it is.
        kind: Name,
        /// A bit for each.
        missing: u64,
    },
    /// Something is given for a device that is not there.
    #[error(
        "a disk '{0}' is given here, and the guest has none of that name; leave it out, or say with id=NAME which of the guest's it is"
    )]
    Superfluous(Name),
    /// The host does not give what the device takes.
    #[error("the device '{id}' cannot be made: {cause}")]
    Host {
        /// Which one.
        id: Name,
        /// What the host said.
        cause: io::Error,
    },
    /// What the host has given for it has gone while its guest was on its way here.
    #[error("the device '{id}' cannot go on here: {cause}")]
    Gone {
        /// Which one.
        id: Name,
        /// What is there now.
        cause: io::Error,
    },
    /// It is still at work.
    #[error("the device '{id}' has not come to rest within {limit:?}; nothing is lost, try again")]
    Busy {
        /// Which one.
        id: Name,
        /// How long it had.
        limit: Duration,
    },
    /// What only one host may have does not go over, or come back.
    #[error("the device '{id}' cannot move: {why}")]
    Handover {
        /// Which one.
        id: Name,
        /// Why.
        why: String,
    },
    /// What was saved is not of this device.
    #[error(transparent)]
    State(#[from] RecordError),
}

/// A device. It is made at rest, and works between [`Device::resume`] and [`Device::pause`].
///
/// Registers are accessed by vCPU threads, of which there are many: every method takes `&self`, and a device locks what
/// it must for as short as it can. What takes longer than a register, such as whatever touches guest memory, belongs
/// into a thread of the device's own, which it starts when it is made, stops and lets run as it is told here, and joins
/// when it is dropped. It never runs in the monitor's loop: with post-copy, a thread that touches one
/// which has not come waits for it, and the loop is what takes the connection over which it comes.
pub trait Device: Send + Sync + Debug {
    /// Which one it is, what it is, and the version of what it saves.
    fn description(&self) -> &DeviceDescription;

    /// Comes to rest: when this returns `Ok`, the device does nothing with guest memory and raises no interrupt until
    /// [`Device::resume`], and what it has begun is finished or part of what it saves. The vCPUs are paused already.
    ///
    /// # Errors
    /// When it is still at work at `deadline`. It has been told, and comes to rest as soon as it can.
    fn pause(&self, deadline: Instant) -> Result<(), StillBusy> {
        let _ = deadline;
        Ok(())
    }

    /// Goes on, whether or not it had come to rest. The vCPUs are still paused.
    fn resume(&self) {}

    /// Takes a step of its guest's way to another host, or back.
    ///
    /// # Errors
    /// When it cannot, or has not by `deadline`.
    fn hand_over(&self, step: Handover, deadline: Instant) -> Result<(), DeviceError> {
        let _ = (step, deadline);
        Ok(())
    }

    /// Back to what it was when it was made. It is at rest.
    fn reset(&self);

    /// What it needs to be set up the same elsewhere. It is at rest.
    ///
    /// # Errors
    /// When it cannot be written down.
    fn save(&self) -> Result<Record, RecordError>;

    /// Becomes what was saved. It is at rest, and has not worked yet.
    ///
    /// # Errors
    /// When the record is not of such a device, or says what cannot be.
    fn restore(&self, saved: &Record) -> Result<(), DeviceError>;

    /// The ports at which it answers.
    fn ports(self: Arc<Self>) -> Vec<(Range<u64>, Arc<dyn RegisterAccess>)> {
        Vec::new()
    }

    /// The guest physical addresses at which it answers.
    fn memory(self: Arc<Self>) -> Vec<(Range<u64>, Arc<dyn RegisterAccess>)> {
        Vec::new()
    }
}

/// What becomes of what a device works with on the host, where only one host may at a time, such as a disk's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// At the source, while the guest runs: what takes time is begun, so that less is left for when it stands.
    Prepare,
    /// At the source, with the device at rest: what was written lasts, and another host may take it. Until then it is still had here.
    Offer,
    /// At the destination, with the device at rest: it is taken from the host that offers it.
    Take,
    /// At the source: it was or may have been offered, and the guest goes on here. This does not fail.
    Keep,
    /// At the source: it was handed over, and somebody says that the guest does not run there.
    Claim,
    /// At the source: the guest runs there.
    Leave,
}

/// A device had not come to rest in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StillBusy;

/// Registers in one range of ports or guest physical addresses.
pub trait RegisterAccess: Send + Sync {
    /// Fills `data` from the register at `offset` behind the range's start. At ports, `data` is longer than the register
    /// where an instruction repeats: then each element comes from the same register.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data` for the register at `offset`, as [`RegisterAccess::read`] does. With a reason, the guest ends here.
    fn write(&self, offset: u64, data: &[u8]) -> Option<StopReason>;
}
