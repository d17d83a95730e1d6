//! A disk as the user describes it: `path=FILE,readonly,…`.

use std::path::PathBuf;
use std::str::FromStr;

use crate::devices::virtio::block::{BlockConfig, DiskBackend, ImageError, KIND, MAX_QUEUES};
use crate::devices::{DeviceDescription, DeviceError, table};
use crate::key_value::{KeyValueError, KeyValues};
use crate::record::{Name, RecordError};

/// What may be said of a disk.
const KEYS: [&str; 7] = ["path", "readonly", "direct", "format", "id", "serial", "queues"];
/// Most bytes of a serial number (`VIRTIO_BLK_ID_BYTES`).
const MAX_SERIAL: usize = 20;

/// Why a disk cannot be as it is described.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The description.
    #[error(transparent)]
    Option(#[from] KeyValueError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] RecordError),
    /// Its number of queues.
    #[error("--disk: {0} queues are not possible: 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// Its serial number.
    #[error("--disk: the serial number {0:?} is not possible: at most {MAX_SERIAL} bytes of ASCII")]
    Serial(String),
    /// Its format.
    #[error("--disk: format={0} is not possible; make a raw image with `qemu-img convert -O raw IMAGE FILE`")]
    Format(String),
    /// It is the guest's, which knows it already.
    #[error("--disk: a guest that arrives has been told the {0} of its disk already; leave it out")]
    Known(&'static str),
    /// Two are one.
    #[error("--disk: two disks are {0}")]
    Twice(String),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// What the guest would see of it.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its device's id, if it was given one.
    pub id: Option<Name>,
    /// Its image.
    pub backend: DiskBackend,
    /// By which the guest knows it again; the id when left out.
    pub serial: Option<String>,
    /// Number of queues; one when left out.
    pub queues: Option<u16>,
}

impl FromStr for DiskConfig {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let list = KeyValues::parse(text, &KEYS)?;
        let queues = list.parsed("queues")?;
        if let Some(queues) = queues.filter(|queues| !(1..=MAX_QUEUES).contains(queues)) {
            return Err(DiskError::Queues(queues));
        }
        let serial = list.text("serial")?.map(str::to_owned);
        if let Some(serial) = serial.as_ref().filter(|text| text.len() > MAX_SERIAL || !text.is_ascii()) {
            return Err(DiskError::Serial(serial.clone()));
        }
        let format = list.text("format")?;
        if let Some(format) = format.filter(|format| *format != "raw") {
            return Err(DiskError::Format(format.to_owned()));
        }
        let backend = DiskBackend {
            path: PathBuf::from(list.required("path")?),
            readonly: list.switch("readonly")?.unwrap_or(false),
            direct: list.switch("direct")?.unwrap_or(false),
            is_raw: format.is_some(),
        };
        Ok(Self { id: list.text("id")?.map(Name::try_from).transpose()?, backend, serial, queues })
    }
}

impl DiskConfig {
    /// The disks with their devices' ids: those that were given, and `disk0`, `disk1` … for the others by their place.
    ///
    /// # Errors
    /// When two have one id or one image.
    pub fn named(disks: &[Self]) -> Result<Vec<(Name, Self)>, DiskError> {
        let mut named: Vec<(Name, Self)> = Vec::with_capacity(disks.len());
        for (number, disk) in disks.iter().enumerate() {
            let id = disk.id.clone().map_or_else(|| Name::try_from(format!("disk{number}")), Ok)?;
            if named.iter().any(|(other, _)| *other == id) {
                return Err(DiskError::Twice(format!("named '{id}'")));
            }
            if named.iter().any(|(_, other)| other.backend.is_same_image(&disk.backend)) {
                return Err(DiskError::Twice(format!("the image {}", disk.backend.path.display())));
            }
            named.push((id, disk.clone()));
        }
        Ok(named)
    }

    /// What the host gives for the disk of a guest that arrives.
    ///
    /// # Errors
    /// When it says what only the guest's source can.
    pub fn arriving(self) -> Result<DiskBackend, DiskError> {
        match self {
            Self { serial: Some(_), .. } => Err(DiskError::Known("serial")),
            Self { queues: Some(_), .. } => Err(DiskError::Known("queues")),
            Self { backend, .. } => Ok(backend),
        }
    }

    /// What the guest is to see of it. The image is opened for that, and closed again.
    ///
    /// # Errors
    /// When the image cannot be a disk.
    pub fn describe(&self, id: &Name) -> Result<DeviceDescription, DiskError> {
        let image = self.backend.open()?;
        let serial = self.serial.clone().unwrap_or_else(|| id.as_str().chars().take(MAX_SERIAL).collect());
        Ok(table::describe(id.as_str(), KIND)?.with_config(&BlockConfig::of(
            &image,
            serial,
            self.queues.unwrap_or(1),
        ))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_as_written() {
        let disk: DiskConfig = "path=/a,,b.img,readonly,id=root,serial=S1,queues=2".parse().unwrap();
        let backend = DiskBackend { path: "/a,b.img".into(), readonly: true, direct: false, is_raw: false };
        let id = Some("root".try_into().unwrap());
        assert_eq!(disk, DiskConfig { id, backend, serial: Some("S1".into()), queues: Some(2) });
        for (text, words) in [
            ("readonly", "'path' is missing"),
            ("path=x,queues=0", "0 queues"),
            ("path=x,serial=123456789012345678901", "at most 20 bytes"),
            ("path=x,id=No", "no name"),
            ("path=x,format=qcow2", "qemu-img convert"),
            ("path=x,ro", "no 'ro' here; there are path, readonly"),
        ] {
            let why = text.parse::<DiskConfig>().unwrap_err().to_string();
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn disks_have_ids_of_their_own_and_images_of_their_own() {
        let disks = |texts: &[&str]| -> Vec<DiskConfig> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        let named = DiskConfig::named(&disks(&["path=a", "path=b,id=data", "path=c"])).unwrap();
        let ids: Vec<_> = named.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids, ["disk0", "data", "disk2"]);
        assert!(DiskConfig::named(&disks(&["path=a", "path=b,id=disk0"])).is_err());
        assert!(DiskConfig::named(&disks(&["path=a", "path=a"])).is_err());
    }
}
