//! The codes this program exits with: one for each kind of end that a script may want to tell apart.

use crate::config::ConfigError;
use crate::migration::destination::DestinationError;
use crate::migration::source::SourceError;
use crate::migration::wire::{RefusalReason, WireError};

/// Exit codes. Documented in `docs/operating.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest switched itself off, or what was asked for is done.
    Success = 0,
    /// Anything without a code of its own.
    Failure = 1,
    /// The command line or configuration is wrong.
    Usage = 2,
    /// The API socket exists already.
    SocketExists = 3,
    /// The guest ended in a triple fault.
    TripleFault = 4,
    /// KVM or the host could not go on with the guest.
    GuestFailed = 5,
    /// Nobody answers at the destination.
    Unreachable = 10,
    /// The destination refuses: memory.
    RefusedMemory = 11,
    /// The destination refuses: processor.
    RefusedCpu = 12,
    /// The destination refuses: devices.
    RefusedDevices = 13,
    /// The other side is another program.
    OtherProgram = 14,
    /// The other side speaks another version.
    OtherVersion = 15,
    /// The connection ended or fell silent before switchover.
    ConnectionLost = 16,
    /// What came over the connection makes no sense.
    Garbled = 17,
    /// The guest writes faster than the connection carries.
    NotConverging = 18,
    /// The migration was cancelled.
    Cancelled = 19,
    /// The guest was handed over and nobody has confirmed that it runs.
    Unconfirmed = 20,
    /// The destination takes another guest, or has taken one.
    RefusedBusy = 21,
    /// Interrupted by a signal.
    Interrupted = 130,
}

impl From<ExitCode> for u8 {
    fn from(code: ExitCode) -> Self {
        code as Self
    }
}

impl ExitCode {
    const ALL: [Self; 19] = [
        Self::Success,
        Self::Failure,
        Self::Usage,
        Self::SocketExists,
        Self::TripleFault,
        Self::GuestFailed,
        Self::Unreachable,
        Self::RefusedMemory,
        Self::RefusedCpu,
        Self::RefusedDevices,
        Self::OtherProgram,
        Self::OtherVersion,
        Self::ConnectionLost,
        Self::Garbled,
        Self::NotConverging,
        Self::Cancelled,
        Self::Unconfirmed,
        Self::RefusedBusy,
        Self::Interrupted,
    ];

    /// The code with this number; [`ExitCode::Failure`] when there is none.
    pub fn from_number(number: u8) -> Self {
        Self::ALL.into_iter().find(|code| *code as u8 == number).unwrap_or(Self::Failure)
    }

    /// For a machine that cannot be.
    pub fn of_config(error: &ConfigError) -> Self {
        match error {
            ConfigError::SocketExists(_) => Self::SocketExists,
            _ => Self::Usage,
        }
    }

    /// For a migration that failed at the source.
    pub fn of_source(error: &SourceError) -> Self {
        match error {
            SourceError::Link(_) => Self::Unreachable,
            SourceError::Refused(refusal) => Self::of_refusal(refusal.reason),
            SourceError::Wire(e) => Self::of_wire(e),
            SourceError::Cancelled => Self::Cancelled,
            SourceError::Channel(_) => Self::Unreachable,
            SourceError::NoPostCopy => Self::OtherVersion,
            SourceError::NotConverging { .. } => Self::NotConverging,
            SourceError::Unconfirmed(_) => Self::Unconfirmed,
            SourceError::Ram(_) | SourceError::Machine(_) => Self::Failure,
        }
    }

    /// For a migration that failed at the destination.
    pub fn of_destination(error: &DestinationError) -> Self {
        match error {
            DestinationError::Refused(refusal) => Self::of_refusal(refusal.reason),
            DestinationError::Wire(e) => Self::of_wire(e),
            DestinationError::Incomplete(_) => Self::Garbled,
            DestinationError::Machine(e) if e.is_of_state() => Self::Garbled,
            DestinationError::Aborted(_) => Self::ConnectionLost,
            DestinationError::Cancelled => Self::Interrupted,
            _ => Self::Failure,
        }
    }

    fn of_refusal(reason: RefusalReason) -> Self {
        match reason {
            RefusalReason::Memory => Self::RefusedMemory,
            RefusalReason::Cpu => Self::RefusedCpu,
            RefusalReason::Devices => Self::RefusedDevices,
            RefusalReason::Connection => Self::ConnectionLost,
            RefusalReason::Stream => Self::Garbled,
            RefusalReason::Host => Self::Failure,
            RefusalReason::Busy => Self::RefusedBusy,
        }
    }

    fn of_wire(error: &WireError) -> Self {
        match error {
            WireError::Io(_) | WireError::Closed | WireError::Silent => Self::ConnectionLost,
            WireError::NotThermocline { .. } => Self::OtherProgram,
            WireError::Version { .. } => Self::OtherVersion,
            _ => Self::Garbled,
        }
    }
}
