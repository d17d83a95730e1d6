//! What the ends of the monitor and of requests mean on the command line.

use command_line::End;

use crate::PROGRAM;
use crate::config::{ConfigError, DiskError};
use crate::control::client::ClientError;
use crate::control::{Failure, FailureKind, MigrationFailure};
use crate::devices::StopReason;
use crate::exit::ExitCode;
use crate::monitor::Outcome;

/// What a monitor's end means.
///
/// # Errors
/// Unless it is a success.
pub(super) fn of_monitor(outcome: Outcome) -> Result<(), End> {
    match outcome {
        Outcome::Guest(StopReason::PowerOff | StopReason::Reset) | Outcome::Quit => Ok(()),
        Outcome::Guest(StopReason::TripleFault) => Err(End::text(
            ExitCode::TripleFault,
            "the guest ended in a triple fault: a fault while it handled a fault while it handled a fault",
        )),
        Outcome::Guest(StopReason::Panic) => {
            Err(End::text(ExitCode::GuestPanicked, "the guest's kernel has panicked; its console says why"))
        }
        Outcome::Guest(StopReason::Failed(why)) => Err(End::text(ExitCode::GuestFailed, why)),
        Outcome::Interrupted => Err(End::text(ExitCode::Interrupted, "interrupted; the guest is gone")),
        Outcome::Migrated => {
            PROGRAM.say("the guest runs at the destination now");
            Ok(())
        }
        Outcome::NotArrived(e) => Err(End::new(ExitCode::of_destination(&e), e)),
    }
}

/// With which options of this program a failure can be met, where the sentence asks for something that has one.
fn hint(failure: &Failure) -> Option<&'static str> {
    match (failure.kind, failure.reason) {
        (_, Some(MigrationFailure::NotConverging)) => Some("--switchover now, --downtime-limit"),
        (FailureKind::HandedOver, _) | (_, Some(MigrationFailure::Unconfirmed)) => {
            Some("thermocline ctl resume --force")
        }
        (FailureKind::PagesOutstanding, _) => Some("thermocline ctl reconnect, thermocline ctl quit --force"),
        _ => None,
    }
}

impl From<ConfigError> for End {
    fn from(e: ConfigError) -> Self {
        Self::new(ExitCode::of_config(&e), e)
    }
}

impl From<DiskError> for End {
    fn from(e: DiskError) -> Self {
        Self::new(ExitCode::Usage, e)
    }
}

impl From<ClientError> for End {
    fn from(e: ClientError) -> Self {
        match &e {
            ClientError::Failed(failure) => {
                let hint = hint(failure).map_or_else(String::new, |options| format!(" ({options})"));
                Self::text(ExitCode::of_failure(failure), format!("{e}{hint}"))
            }
            _ => Self::new(ExitCode::Failure, e),
        }
    }
}
