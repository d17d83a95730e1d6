//! The guest's command line: `working-set=64MiB,cold=384MiB,writes=50,rate=2000,seed=1,cpus=1`.
//!
//! Compiled into the image, which obeys it, and into the host library, which refuses a bad one before boot.

use core::fmt;
use core::str::FromStr;

use crate::pattern::PAGE;

/// What the guest is asked to do. The text form is what `Display` writes and `FromStr` reads; every field is optional
/// there and has the default below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Options {
    /// Bytes that are checked and rewritten again and again, a multiple of 4 KiB. Default 32 MiB.
    pub working_set: u64,
    /// Bytes that are written once at boot and then left alone, a multiple of 4 KiB. Default none.
    pub cold: u64,
    /// Percent of the page operations that rewrite the page, 0 to 100. Default 50.
    pub writes: u32,
    /// Page operations a second over all vCPUs, 0 for as many as it can. Default 0.
    pub rate: u64,
    /// Chooses the contents of the pages and the order of visits. Default 1.
    pub seed: u64,
    /// vCPUs to use, 1 or 2. Default 1.
    pub cpus: u32,
    /// Bytes of the first virtio disk that are used, from its start, a multiple of 4 KiB. Default none: no disk.
    pub disk: u64,
    /// Whether the first virtio network device is used. Default no.
    pub net: bool,
    /// Bytes that are given back to the host by the balloon and free page reporting, a multiple of 4 KiB. Default none: no
    /// balloon.
    pub free: u64,
    /// Whether the first virtio source of randomness is used. Default no.
    pub random: bool,
    /// Whether devices interrupt; otherwise the guest polls. Default no.
    pub interrupts: bool,
}

/// The most bytes that working set and cold pages may have: what the image can map.
pub const MAX_BYTES: u64 = 64 << 30;

impl Default for Options {
    fn default() -> Self {
        Self {
            working_set: 32 << 20,
            cold: 0,
            writes: 50,
            rate: 0,
            seed: 1,
            cpus: 1,
            disk: 0,
            net: false,
            free: 0,
            random: false,
            interrupts: false,
        }
    }
}

impl Options {
    /// Checks what the types do not: page multiples and ranges. `FromStr` has done this already.
    pub fn validate(&self) -> Result<(), OptionsError> {
        for (name, bytes) in
            [("working-set", self.working_set), ("cold", self.cold), ("disk", self.disk), ("free", self.free)]
        {
            if bytes % PAGE != 0 {
                return Err(OptionsError::NotPages { name });
            }
            if bytes > MAX_BYTES {
                return Err(OptionsError::OutOfRange { name, expected: "at most 64GiB" });
            }
        }
        if self.writes > 100 {
            return Err(OptionsError::OutOfRange { name: "writes", expected: "0 to 100 percent" });
        }
        if self.rate > MAX_RATE {
            return Err(OptionsError::OutOfRange { name: "rate", expected: "at most 1000000000 a second" });
        }
        if !(1..=2).contains(&self.cpus) {
            return Err(OptionsError::OutOfRange { name: "cpus", expected: "1 or 2" });
        }
        Ok(())
    }

    /// Whether any device is used.
    pub fn devices(&self) -> bool {
        self.disk > 0 || self.net || self.free > 0 || self.random
    }

    fn set(&mut self, word: &str) -> Result<(), OptionsError> {
        let (name, value) = word.split_once('=').ok_or(OptionsError::NotAnOption)?;
        match name {
            "working-set" => self.working_set = size("working-set", value)?,
            "cold" => self.cold = size("cold", value)?,
            "writes" => self.writes = number("writes", value)?,
            "rate" => self.rate = number("rate", value)?,
            "seed" => self.seed = number("seed", value)?,
            "cpus" => self.cpus = number("cpus", value)?,
            "disk" => self.disk = size("disk", value)?,
            "net" => self.net = switch("net", value)?,
            "free" => self.free = size("free", value)?,
            "random" => self.random = switch("random", value)?,
            "interrupts" => self.interrupts = switch("interrupts", value)?,
            _ => return Err(OptionsError::NotAnOption),
        }
        Ok(())
    }
}

/// Above this the pacing arithmetic would overflow; no machine comes near it.
pub const MAX_RATE: u64 = 1_000_000_000;

impl FromStr for Options {
    type Err = OptionsError;

    fn from_str(text: &str) -> Result<Self, OptionsError> {
        let mut options = Self::default();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            options.set(word)?;
        }
        options.validate()?;
        Ok(options)
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { working_set, cold, writes, rate, seed, cpus, disk, net, free, random, interrupts } = *self;
        let (working_set, cold) = (Size(working_set), Size(cold));
        write!(f, "working-set={working_set},cold={cold},writes={writes},rate={rate},seed={seed},cpus={cpus}")?;
        for (name, bytes) in [("disk", disk), ("free", free)].into_iter().filter(|(_, bytes)| *bytes > 0) {
            write!(f, ",{name}={}", Size(bytes))?;
        }
        let switches = [("net", net), ("random", random), ("interrupts", interrupts)];
        switches.iter().filter(|(_, on)| *on).try_for_each(|(name, _)| write!(f, ",{name}=on"))
    }
}

/// Why a command line was refused. The message says what would have been accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionsError {
    /// A word that is not `name=value` with a known name.
    NotAnOption,
    /// The value of this option is not a whole number.
    NotANumber {
        /// Option with the bad value.
        name: &'static str,
    },
    /// The value of this option is neither on nor off.
    NotASwitch {
        /// Option with the bad value.
        name: &'static str,
    },
    /// The value of this option is not a size.
    NotASize {
        /// Option with the bad value.
        name: &'static str,
    },
    /// A size that is not a multiple of the page size.
    NotPages {
        /// Option with the bad value.
        name: &'static str,
    },
    /// A value outside what the option takes.
    OutOfRange {
        /// Option with the bad value.
        name: &'static str,
        /// What it takes.
        expected: &'static str,
    },
}

impl fmt::Display for OptionsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnOption => {
                f.write_str(
                    "options are working-set=SIZE, cold=SIZE, writes=PERCENT, rate=N, seed=N, cpus=N, disk=SIZE, ",
                )?;
                f.write_str("net=on, free=SIZE, random=on and interrupts=on")
            }
            Self::NotANumber { name } => write!(f, "option {name} takes a whole number"),
            Self::NotASwitch { name } => write!(f, "option {name} takes on or off"),
            Self::NotASize { name } => write!(f, "option {name} takes a size such as 4096, 512KiB, 64MiB or 2GiB"),
            Self::NotPages { name } => write!(f, "option {name} takes a multiple of 4KiB"),
            Self::OutOfRange { name, expected } => write!(f, "option {name} takes {expected}"),
        }
    }
}

impl core::error::Error for OptionsError {}

/// Bytes, written in the largest unit that leaves a whole number.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.iter().find(|(shift, _)| self.0 != 0 && self.0.trailing_zeros() >= *shift) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

fn size(name: &'static str, text: &str) -> Result<u64, OptionsError> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return Err(OptionsError::NotASize { name }),
    };
    let count: u64 = digits.parse().map_err(|_| OptionsError::NotASize { name })?;
    count.checked_mul(1 << shift).ok_or(OptionsError::NotASize { name })
}

fn switch(name: &'static str, text: &str) -> Result<bool, OptionsError> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(OptionsError::NotASwitch { name }),
    }
}

fn number<T: FromStr>(name: &'static str, text: &str) -> Result<T, OptionsError> {
    text.parse().map_err(|_| OptionsError::NotANumber { name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_documented_form() {
        let options: Options = "working-set=64MiB,cold=384MiB,writes=50,rate=2000,seed=1,cpus=1".parse().unwrap();
        let expected = Options { working_set: 64 << 20, cold: 384 << 20, rate: 2000, ..Options::default() };
        assert_eq!(options, expected);
        assert_eq!("".parse(), Ok(Options::default()));
        assert_eq!("cold=8K, seed=7".parse::<Options>().unwrap().cold, 8192);
        let devices: Options = "disk=64MiB,net=on,free=2MiB,random=on,interrupts=on".parse().unwrap();
        let expected =
            Options { disk: 64 << 20, net: true, free: 2 << 20, random: true, interrupts: true, ..Options::default() };
        assert_eq!(devices, expected);
    }

    #[test]
    fn refuses_and_says_why() {
        for (text, part) in [
            ("cold=5000", "multiple of 4KiB"),
            ("cold=4T", "takes a size"),
            ("cold=99999999999GiB", "takes a size"),
            ("cold=65GiB", "at most 64GiB"),
            ("writes=101", "0 to 100"),
            ("writes=-1", "whole number"),
            ("cpus=3", "1 or 2"),
            ("cpus=0", "1 or 2"),
            ("disk=100", "multiple of 4KiB"),
            ("net=1", "on or off"),
            ("speed=1", "options are"),
            ("rate", "options are"),
        ] {
            let error = text.parse::<Options>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn display_and_from_str_agree(
            working_set in 0..=MAX_BYTES / PAGE, cold in 0..=MAX_BYTES / PAGE, writes in 0u32..=100,
            rate in 0..=MAX_RATE, seed: u64, cpus in 1u32..=2, disk in 0..=MAX_BYTES / PAGE, free in 0..=MAX_BYTES / PAGE,
            net: bool, random: bool, interrupts: bool,
        ) {
            let (working_set, cold, disk, free) = (working_set * PAGE, cold * PAGE, disk * PAGE, free * PAGE);
            let options = Options { working_set, cold, writes, rate, seed, cpus, disk, net, free, random, interrupts };
            prop_assert_eq!(options.to_string().parse(), Ok(options));
        }

        #[test]
        fn any_text_is_refused_or_valid(text in "\\PC{0,40}") {
            if let Ok(options) = text.parse::<Options>() {
                prop_assert!(options.validate().is_ok());
            }
        }
    }
}
