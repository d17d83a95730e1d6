//! Why a request was not done, for programs and for people. What a command-line client exits with is its own affair.

use serde::{Deserialize, Serialize};

use crate::migration::source::SourceError;
use crate::migration::wire::{RefusalReason, WireError};

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of reason it is.
    pub kind: FailureKind,
    /// With [`FailureKind::MigrationFailed`], why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<MigrationFailure>,
    /// The sentence for people.
    pub text: String,
}

impl Failure {
    /// A failure of a kind that needs no reason.
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Self { kind, reason: None, text: text.into() }
    }
}

/// Kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The request makes no sense, on any machine.
    Invalid,
    /// What it is about is not there.
    NotFound,
    /// Something else is under way, which will end.
    Busy,
    /// The guest was handed over and may run elsewhere: not without force.
    HandedOver,
    /// The guest runs elsewhere, and pages that it may need are only here: not without force.
    PagesOutstanding,
    /// The machine is not in a state in which it can be done; the sentence says what would have to be done first.
    WrongState,
    /// The migration failed.
    MigrationFailed,
    /// The host refused.
    Host,
}

/// Why a migration failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationFailure {
    /// Nobody answers at the destination.
    Unreachable,
    /// The destination refuses: memory.
    RefusedMemory,
    /// The destination refuses: processor.
    RefusedCpu,
    /// The destination refuses: devices.
    RefusedDevices,
    /// The destination takes another guest, or has taken one.
    RefusedBusy,
    /// The destination's host failed.
    RefusedHost,
    /// The other side is another program.
    OtherProgram,
    /// The other side speaks another version.
    OtherVersion,
    /// The connection ended or fell silent.
    ConnectionLost,
    /// What came over the connection makes no sense.
    Garbled,
    /// The guest writes faster than the connection carries.
    NotConverging,
    /// It was cancelled.
    Cancelled,
    /// The guest was handed over and nobody has confirmed that it runs.
    Unconfirmed,
    /// This host failed.
    Host,
}

impl MigrationFailure {
    /// Why a migration failed, at the source.
    pub fn of(error: &SourceError) -> Self {
        match error {
            SourceError::Link(_) | SourceError::Channel(_) => Self::Unreachable,
            SourceError::Refused(refusal) => refusal.reason.into(),
            SourceError::Wire(e) => e.into(),
            SourceError::Cancelled => Self::Cancelled,
            SourceError::NoPostCopy => Self::OtherVersion,
            SourceError::NotConverging { .. } => Self::NotConverging,
            SourceError::Unconfirmed(_) => Self::Unconfirmed,
            SourceError::Ram(_) | SourceError::Machine(_) => Self::Host,
        }
    }
}

impl From<RefusalReason> for MigrationFailure {
    fn from(reason: RefusalReason) -> Self {
        match reason {
            RefusalReason::Memory => Self::RefusedMemory,
            RefusalReason::Cpu => Self::RefusedCpu,
            RefusalReason::Devices => Self::RefusedDevices,
            RefusalReason::Connection => Self::ConnectionLost,
            RefusalReason::Stream => Self::Garbled,
            RefusalReason::Host => Self::RefusedHost,
            RefusalReason::Busy => Self::RefusedBusy,
        }
    }
}

impl From<&WireError> for MigrationFailure {
    fn from(error: &WireError) -> Self {
        match error {
            WireError::Io(_) | WireError::Closed | WireError::Silent => Self::ConnectionLost,
            WireError::NotThermocline { .. } => Self::OtherProgram,
            WireError::Version { .. } => Self::OtherVersion,
            _ => Self::Garbled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_what_the_guide_says() {
        let failure = Failure {
            kind: FailureKind::MigrationFailed,
            reason: Some(MigrationFailure::RefusedCpu),
            text: "no".into(),
        };
        let json = r#"{"kind":"migration_failed","reason":"refused_cpu","text":"no"}"#;
        assert_eq!(serde_json::to_string(&failure).unwrap(), json);
        let json = r#"{"kind":"not_found","text":"no"}"#;
        assert_eq!(serde_json::to_string(&Failure::new(FailureKind::NotFound, "no")).unwrap(), json);
    }
}
