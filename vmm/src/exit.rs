//! The codes this program exits with: one for each kind of end that a script may want to tell apart.

use crate::config::ConfigError;
use crate::control::{Failure, FailureKind, MigrationFailure};
use crate::migration::destination::DestinationError;
use crate::migration::source::SourceError;

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
    /// The guest's kernel has panicked.
    GuestPanicked = 6,
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
    /// For a request that was not done.
    pub fn of_failure(failure: &Failure) -> Self {
        match (failure.kind, failure.reason) {
            (FailureKind::MigrationFailed, Some(reason)) => Self::of_migration(reason),
            (FailureKind::Invalid, _) => Self::Usage,
            _ => Self::Failure,
        }
    }

    fn of_migration(reason: MigrationFailure) -> Self {
        match reason {
            MigrationFailure::Unreachable => Self::Unreachable,
            MigrationFailure::RefusedMemory => Self::RefusedMemory,
            MigrationFailure::RefusedCpu => Self::RefusedCpu,
            MigrationFailure::RefusedDevices => Self::RefusedDevices,
            MigrationFailure::RefusedBusy => Self::RefusedBusy,
            MigrationFailure::OtherProgram => Self::OtherProgram,
            MigrationFailure::OtherVersion => Self::OtherVersion,
            MigrationFailure::ConnectionLost => Self::ConnectionLost,
            MigrationFailure::Garbled => Self::Garbled,
            MigrationFailure::NotConverging => Self::NotConverging,
            MigrationFailure::Cancelled => Self::Cancelled,
            MigrationFailure::Unconfirmed => Self::Unconfirmed,
            MigrationFailure::RefusedHost | MigrationFailure::Host => Self::Failure,
        }
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
        Self::of_migration(MigrationFailure::of(error))
    }

    /// For a migration that failed at the destination.
    pub fn of_destination(error: &DestinationError) -> Self {
        match error {
            DestinationError::Refused(refusal) => Self::of_migration(refusal.reason.into()),
            DestinationError::Wire(e) => Self::of_migration(e.into()),
            DestinationError::Incomplete(_) => Self::Garbled,
            DestinationError::Machine(e) if e.is_of_state() => Self::Garbled,
            DestinationError::Machine(e) if e.is_of_backends() => Self::RefusedDevices,
            DestinationError::Aborted(_) => Self::ConnectionLost,
            DestinationError::Cancelled => Self::Interrupted,
            _ => Self::Failure,
        }
    }
}
