//! Values of options that are lists, such as `path=disk.img,readonly`: keys with values, or keys alone, between commas. A comma in a
//! value is written twice, as with QEMU.

use std::fmt::Display;
use std::str::FromStr;

/// Why a list cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyValueError {
    /// No such key.
    #[error("there is no '{key}' here; there are {known}")]
    Unknown {
        /// What was written.
        key: String,
        /// What could be.
        known: String,
    },
    /// A key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A key that needs a value has none.
    #[error("'{0}' needs a value: write {0}=…")]
    NoValue(&'static str),
    /// A key that must be there is not.
    #[error("'{0}' is missing: write {0}=…")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{key}={value}: {why}")]
    Value {
        /// Which.
        key: &'static str,
        /// What was written.
        value: String,
        /// Why it cannot be.
        why: String,
    },
}

/// Keys, each with its value or none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyValues(Vec<(String, Option<String>)>);

impl KeyValues {
    /// Reads a list in which these keys may be.
    ///
    /// # Errors
    /// When another is in it, or one twice.
    pub fn parse(text: &str, known: &[&str]) -> Result<Self, KeyValueError> {
        let mut pairs: Vec<(String, Option<String>)> = Vec::new();
        for part in split(text) {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (part, None),
            };
            if !known.contains(&key.as_str()) {
                return Err(KeyValueError::Unknown { key, known: known.join(", ") });
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(KeyValueError::Twice(key));
            }
            pairs.push((key, value));
        }
        Ok(Self(pairs))
    }

    fn get(&self, key: &str) -> Option<&Option<String>> {
        self.0.iter().find(|(other, _)| other == key).map(|(_, value)| value)
    }

    /// The value of a key, if the key is there.
    ///
    /// # Errors
    /// When it is there without a value, or with an empty one.
    pub fn text(&self, key: &'static str) -> Result<Option<&str>, KeyValueError> {
        match self.get(key) {
            None => Ok(None),
            Some(Some(value)) if !value.is_empty() => Ok(Some(value)),
            Some(_) => Err(KeyValueError::NoValue(key)),
        }
    }

    /// The value of a key that must be there.
    ///
    /// # Errors
    /// When it is not, or has no value.
    pub fn required(&self, key: &'static str) -> Result<&str, KeyValueError> {
        self.text(key)?.ok_or(KeyValueError::Missing(key))
    }

    /// The value of a key as another type, if the key is there.
    ///
    /// # Errors
    /// When it has no value, or one that cannot be.
    pub fn parsed<T: FromStr<Err: Display>>(&self, key: &'static str) -> Result<Option<T>, KeyValueError> {
        let wrong = |value: &str, e: T::Err| KeyValueError::Value { key, value: value.to_owned(), why: e.to_string() };
        self.text(key)?.map(|value| value.parse().map_err(|e| wrong(value, e))).transpose()
    }

    /// Whether something is on: `key`, `key=on` or `key=true`; off with `key=off` or `key=false`.
    ///
    /// # Errors
    /// When it is neither.
    pub fn switch(&self, key: &'static str) -> Result<Option<bool>, KeyValueError> {
        match self.get(key).map(|value| value.as_deref()) {
            None => Ok(None),
            Some(None | Some("on" | "true")) => Ok(Some(true)),
            Some(Some("off" | "false")) => Ok(Some(false)),
            Some(Some(value)) => {
                Err(KeyValueError::Value { key, value: value.to_owned(), why: "write on or off".into() })
            }
        }
    }
}

/// The parts between single commas, with double ones made single. Nothing is no part.
fn split(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            ',' if rest.next_if_eq(&',').is_none() => parts.push(std::mem::take(&mut part)),
            c => part.push(c),
        }
    }
    parts.push(part);
    if parts.len() == 1 && parts[0].is_empty() { Vec::new() } else { parts }
}

/// A value as it is written in a list.
pub fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KNOWN: [&str; 3] = ["path", "readonly", "queues"];

    #[test]
    fn keys_have_values_or_are_switches() {
        let list = KeyValues::parse("path=a,,b=c.img,readonly,queues=4", &KNOWN).unwrap();
        assert_eq!(list.required("path"), Ok("a,b=c.img"));
        assert_eq!((list.switch("readonly"), list.parsed("queues")), (Ok(Some(true)), Ok(Some(4_u16))));
        assert_eq!(KeyValues::parse("readonly=off", &KNOWN).unwrap().switch("readonly"), Ok(Some(false)));
        assert_eq!(KeyValues::parse("", &KNOWN).unwrap(), KeyValues::default());
    }

    #[test]
    fn what_cannot_be_is_named() {
        let says = |text: &str, words: &str| {
            let why = KeyValues::parse(text, &KNOWN)
                .and_then(|list| list.parsed::<u16>("queues").map(drop).and(list.required("path").map(drop)))
                .unwrap_err()
                .to_string();
            assert!(why.contains(words), "{text}: {why}");
        };
        says("pth=x", "no 'pth' here; there are path, readonly, queues");
        says("path=x,,path=y,path=z", "'path' is given twice");
        says("readonly", "'path' is missing");
        says("path", "'path' needs a value");
        says("path=", "'path' needs a value");
        says("path=x,queues=many", "queues=many: invalid digit");
        says("path=x,", "no '' here");
    }

    proptest! {
        #[test]
        fn every_value_can_be_written(value in "[a-z,=/ ]{1,20}") {
            let list = KeyValues::parse(&format!("path={},readonly", escaped(&value)), &KNOWN).unwrap();
            prop_assert_eq!(list.required("path"), Ok(value.as_str()));
        }
    }
}
