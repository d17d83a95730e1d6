//! Saved state as records: who it is of, what that is, in which version, and its bytes.
//!
//! A type that is saved implements [`Saved`]. Its bytes are postcard's of exactly that type, so a change of a field is a
//! change of the bytes and takes a new version; `tests/golden.rs` holds the bytes of every kind.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bounded::at_most;

/// The longest name.
const MAX_NAME: usize = 64;
/// Most records of one machine.
const MAX_RECORDS: usize = 1024;
/// Most bytes of one record.
const MAX_BYTES: usize = 1 << 20;

/// A short name of small letters, digits, `-` and `_`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = RecordError;

    fn try_from(text: String) -> Result<Self, RecordError> {
        let possible = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'-' | b'_');
        if text.is_empty() || text.len() > MAX_NAME || !text.bytes().all(possible) {
            let shown = text.chars().take(MAX_NAME).collect();
            return Err(RecordError::Name(shown));
        }
        Ok(Self(text))
    }
}

impl TryFrom<&str> for Name {
    type Error = RecordError;

    fn try_from(text: &str) -> Result<Self, RecordError> {
        text.to_owned().try_into()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why saved state is not what this machine is made of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Something cannot have this name.
    #[error("{0:?} is no name of a part of a machine: 1 to {MAX_NAME} small letters, digits, - and _")]
    Name(String),
    /// Of something that is not there.
    #[error("the saved state has a part '{id}' of kind '{kind}', which this machine has not")]
    Unknown {
        /// Of what.
        id: Name,
        /// What that is.
        kind: Name,
    },
    /// Of something that has been there already.
    #[error("the saved state has the part '{0}' twice")]
    Twice(Name),
    /// Nothing of something that is there.
    #[error("the saved state has no part '{id}' of kind '{kind}'")]
    Missing {
        /// Of what.
        id: String,
        /// What that is.
        kind: String,
    },
    /// Of something else with the same name.
    #[error("the part '{id}' of the saved state is of kind '{saved}', this machine's is '{here}'")]
    Kind {
        /// Of what.
        id: Name,
        /// What it was.
        saved: Name,
        /// What it is here.
        here: String,
    },
    /// In a version that is not known.
    #[error(
        "the part '{id}' of the saved state, of kind '{kind}', is of version {saved}; this program reads version {here}"
    )]
    Version {
        /// Of what.
        id: Name,
        /// What that is.
        kind: Name,
        /// The version of its bytes.
        saved: u16,
        /// What can be read.
        here: u16,
    },
    /// The bytes are not those of such a thing.
    #[error("the part '{id}' of the saved state makes no sense as '{kind}' of version {version}: {why}")]
    Bytes {
        /// Of what.
        id: Name,
        /// What that is.
        kind: Name,
        /// The version of its bytes.
        version: u16,
        /// What is wrong.
        why: String,
    },
    /// Something cannot be written down.
    #[error("the state of '{id}' cannot be saved: {why}")]
    Unwritable {
        /// Of what.
        id: String,
        /// What is wrong.
        why: String,
    },
}

/// A type that is saved in records.
pub trait Saved: Serialize + DeserializeOwned {
    /// What it is the state of.
    const KIND: &'static str;
    /// The version of its bytes.
    const VERSION: u16;

    /// Looks at what the types cannot say.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence.
    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

/// The state of one part of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which part, such as `vcpu0`.
    pub id: Name,
    /// What that is, such as `vcpu-x86_64`.
    pub kind: Name,
    /// The version of the bytes.
    pub version: u16,
    /// Postcard of the kind's type.
    #[serde(deserialize_with = "at_most::<_, _, MAX_BYTES>")]
    pub bytes: Vec<u8>,
}

impl Record {
    /// The record of `state`, which is that of the part `id`.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub fn of<T: Saved>(id: &str, state: &T) -> Result<Self, RecordError> {
        let bytes = postcard::to_stdvec(state)
            .map_err(|e| RecordError::Unwritable { id: id.to_owned(), why: e.to_string() })?;
        if bytes.len() > MAX_BYTES {
            let why = format!("it has {} bytes, {MAX_BYTES} are possible", bytes.len());
            return Err(RecordError::Unwritable { id: id.to_owned(), why });
        }
        Ok(Self { id: id.try_into()?, kind: T::KIND.try_into()?, version: T::VERSION, bytes })
    }

    /// The state in it.
    ///
    /// # Errors
    /// When it is of another kind or version, or the bytes are not its, whole and alone.
    pub fn read<T: Saved>(&self) -> Result<T, RecordError> {
        self.read_as(T::KIND, T::VERSION)
    }

    /// The state in it, of one of several kinds that are saved as the same type.
    ///
    /// # Errors
    /// As [`Record::read`].
    pub fn read_as<T: Saved>(&self, here: &str, here_version: u16) -> Result<T, RecordError> {
        let Self { id, kind, version, bytes } = self;
        if kind.as_str() != here {
            return Err(RecordError::Kind { id: id.clone(), saved: kind.clone(), here: here.to_owned() });
        }
        if *version != here_version {
            let (id, kind) = (id.clone(), kind.clone());
            return Err(RecordError::Version { id, kind, saved: *version, here: here_version });
        }
        let wrong = |why: String| RecordError::Bytes { id: id.clone(), kind: kind.clone(), version: *version, why };
        let (state, rest) = postcard::take_from_bytes::<T>(bytes).map_err(|e| wrong(e.to_string()))?;
        if !rest.is_empty() {
            return Err(wrong(format!("{} bytes too many", rest.len())));
        }
        state.validate().map_err(wrong)?;
        Ok(state)
    }

    /// The state in it, for people.
    ///
    /// # Errors
    /// As [`Record::read`].
    pub fn show<T: Saved>(&self) -> Result<serde_json::Value, RecordError> {
        self.show_as::<T>(T::KIND, T::VERSION)
    }

    /// The state in it, of one of several kinds that are saved as the same type, for people.
    ///
    /// # Errors
    /// As [`Record::read`].
    pub fn show_as<T: Saved>(&self, here: &str, here_version: u16) -> Result<serde_json::Value, RecordError> {
        let unwritable = |e: serde_json::Error| RecordError::Unwritable { id: self.id.to_string(), why: e.to_string() };
        serde_json::to_value(self.read_as::<T>(here, here_version)?).map_err(unwritable)
    }
}

/// The state of all parts of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records(#[serde(deserialize_with = "at_most::<_, _, MAX_RECORDS>")] pub Vec<Record>);

impl Records {
    /// Sorts them by part.
    ///
    /// # Errors
    /// When a part comes twice.
    pub fn by_part(&self) -> Result<Parts<'_>, RecordError> {
        let mut parts = BTreeMap::new();
        for record in &self.0 {
            if parts.insert(record.id.as_str(), record).is_some() {
                return Err(RecordError::Twice(record.id.clone()));
            }
        }
        Ok(Parts(parts))
    }
}

/// Records whose parts have not been asked for yet.
#[derive(Debug)]
pub struct Parts<'a>(BTreeMap<&'a str, &'a Record>);

impl<'a> Parts<'a> {
    /// The record of the part `id`, which is of `kind`.
    ///
    /// # Errors
    /// When there is none.
    pub fn take(&mut self, id: &str, kind: &str) -> Result<&'a Record, RecordError> {
        self.0.remove(id).ok_or_else(|| RecordError::Missing { id: id.to_owned(), kind: kind.to_owned() })
    }

    /// The state of the part `id`.
    ///
    /// # Errors
    /// When there is none, or as [`Record::read`].
    pub fn read<T: Saved>(&mut self, id: &str) -> Result<T, RecordError> {
        self.take(id, T::KIND)?.read()
    }

    /// Says that the machine has no more parts.
    ///
    /// # Errors
    /// When there is state of another one.
    pub fn finish(self) -> Result<(), RecordError> {
        match self.0.into_values().next() {
            Some(record) => Err(RecordError::Unknown { id: record.id.clone(), kind: record.kind.clone() }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Lamp {
        lit: bool,
        watts: u16,
    }

    impl Saved for Lamp {
        const KIND: &'static str = "lamp";
        const VERSION: u16 = 3;

        fn validate(&self) -> Result<(), String> {
            if self.watts > 100 { Err(format!("{} W", self.watts)) } else { Ok(()) }
        }
    }

    fn record() -> Record {
        Record::of("lamp0", &Lamp { lit: true, watts: 40 }).unwrap()
    }

    #[test]
    fn what_is_saved_is_read_again() {
        assert_eq!(record().read(), Ok(Lamp { lit: true, watts: 40 }));
        let records = Records(vec![record()]);
        let mut parts = records.by_part().unwrap();
        assert_eq!(parts.read("lamp0"), Ok(Lamp { lit: true, watts: 40 }));
        parts.finish().unwrap();
    }

    #[test]
    fn what_is_something_else_is_refused_by_name() {
        let says = |result: Result<Lamp, RecordError>, words: &[&str]| {
            let text = result.unwrap_err().to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        };
        let kind = Record { kind: "candle".try_into().unwrap(), ..record() };
        says(kind.read(), &["lamp0", "'candle'", "'lamp'"]);
        says(Record { version: 4, ..record() }.read(), &["lamp0", "version 4", "version 3"]);
        says(Record { bytes: vec![2, 40], ..record() }.read(), &["lamp0", "no sense"]);
        says(Record { bytes: vec![1], ..record() }.read(), &["lamp0", "no sense"]);
        says(Record { bytes: vec![1, 40, 0], ..record() }.read(), &["1 bytes too many"]);
        says(Record { bytes: vec![1, 120], ..record() }.read(), &["lamp0", "120 W"]);
    }

    #[test]
    fn each_part_comes_once_and_none_is_left() {
        let twice = Records(vec![record(), record()]);
        assert!(matches!(twice.by_part(), Err(RecordError::Twice(id)) if id.as_str() == "lamp0"));
        let one = Records(vec![record()]);
        let missing = one.by_part().unwrap().read::<Lamp>("lamp1");
        assert_eq!(missing, Err(RecordError::Missing { id: "lamp1".into(), kind: "lamp".into() }));
        assert!(matches!(one.by_part().unwrap().finish(), Err(RecordError::Unknown { .. })));
    }

    #[test]
    fn names_are_short_and_plain() {
        assert!(Name::try_from("vcpu-x86_64").is_ok());
        for name in ["", "Vcpu", "a b", "a\n", &"x".repeat(MAX_NAME + 1)] {
            assert!(Name::try_from(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn more_records_than_a_machine_can_have_are_refused() {
        let bytes = postcard::to_stdvec(&vec![record(); MAX_RECORDS + 1]).unwrap();
        assert!(postcard::from_bytes::<Records>(&bytes).is_err());
        let large = Record { bytes: vec![0; MAX_BYTES + 1], ..record() };
        assert!(postcard::from_bytes::<Records>(&postcard::to_stdvec(&vec![large]).unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = postcard::from_bytes::<Records>(&bytes);
            let _ = Record { bytes, ..record() }.read::<Lamp>();
        }
    }
}
