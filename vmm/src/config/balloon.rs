//! A balloon as the user describes it: `free-page-reporting=on,…`.

use std::str::FromStr;

use crate::devices::virtio::balloon::{BalloonConfig, KIND};
use crate::devices::{DeviceDescription, DeviceError, table};
use crate::key_value::{KeyValueError, KeyValues};

/// What may be said of a balloon.
const KEYS: [&str; 2] = ["free-page-reporting", "deflate-on-oom"];

impl FromStr for BalloonConfig {
    type Err = KeyValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let list = KeyValues::parse(if text == "on" { "" } else { text }, &KEYS)?;
        let usual = Self::default();
        Ok(Self {
            free_page_reporting: list.switch("free-page-reporting")?.unwrap_or(usual.free_page_reporting),
            deflate_on_oom: list.switch("deflate-on-oom")?.unwrap_or(usual.deflate_on_oom),
        })
    }
}

/// What the guest is to see of it.
///
/// # Errors
/// None, for a description that has been read.
pub fn describe(balloon: &BalloonConfig) -> Result<DeviceDescription, DeviceError> {
    table::describe(table::BALLOON, KIND)?.with_config(balloon)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balloons_are_read_as_written() {
        assert_eq!("on".parse(), Ok(BalloonConfig::default()));
        let plain = BalloonConfig { free_page_reporting: false, deflate_on_oom: true };
        assert_eq!("free-page-reporting=off".parse(), Ok(plain));
        assert!("size=1G".parse::<BalloonConfig>().is_err());
    }
}
