//! What a further connection of a migration says of itself: whose it is, what it is for, and of which attempt.

use std::fmt;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

/// What names a migration, also in the logs of both sides: nobody can guess it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationId([u8; 16]);

impl MigrationId {
    /// A new one.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn new() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        // So few bytes come all at once or not at all (getrandom(2)).
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    /// One whose bytes are known.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for MigrationId {
    /// As much as tells the migrations of a log apart, and not enough to join one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Channel {
    /// Pages that nobody waits for, and what has become of all of them.
    Bulk,
    /// Pages that the guest waits for.
    Faults,
}

/// Numbers the attempts to make a migration's channels anew, whoever makes them: the newest counts on both sides, so that a
/// channel which one attempt has left behind is never paired with one of another, and of two sides that call at once one
/// gives way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attempt {
    /// One more than the newest that its maker knew of.
    number: u32,
    /// Tells apart what both sides begin at once.
    tie: u32,
}

impl Attempt {
    /// The one behind this.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn next(self) -> std::io::Result<Self> {
        let mut tie = [0; 4];
        getrandom(&mut tie, GetRandomFlags::empty())?;
        Ok(Self { number: self.number.saturating_add(1), tie: u32::from_ne_bytes(tie) })
    }
}
