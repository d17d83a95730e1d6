//! How a subcommand ends when it does not succeed: a sentence and a code.

use crate::config::ConfigError;
use crate::control::client::ClientError;
use crate::exit::ExitCode;
use crate::kvm::VcpuExitReason;
use crate::monitor::Outcome;

/// A sentence for people and a code for scripts.
#[derive(Debug)]
pub struct End {
    /// The sentence.
    pub error: anyhow::Error,
    /// The code.
    pub code: ExitCode,
}

impl End {
    /// An end with this sentence and code.
    pub fn new(code: ExitCode, error: impl Into<anyhow::Error>) -> Self {
        Self { error: error.into(), code }
    }

    /// An end with this sentence and code.
    pub fn text(code: ExitCode, text: impl std::fmt::Display + std::fmt::Debug + Send + Sync + 'static) -> Self {
        Self { error: anyhow::Error::msg(text), code }
    }

    /// What a monitor's end means.
    ///
    /// # Errors
    /// Unless it is a success.
    pub fn of_monitor(outcome: Outcome) -> Result<(), Self> {
        match outcome {
            Outcome::Guest(VcpuExitReason::PowerOff | VcpuExitReason::Reset) | Outcome::Quit => Ok(()),
            Outcome::Guest(VcpuExitReason::TripleFault) => Err(Self::text(
                ExitCode::TripleFault,
                "the guest ended in a triple fault: a fault while it handled a fault while it handled a fault",
            )),
            Outcome::Guest(VcpuExitReason::Failed(why)) => Err(Self::text(ExitCode::GuestFailed, why)),
            Outcome::Interrupted => Err(Self::text(ExitCode::Interrupted, "interrupted; the guest is gone")),
            Outcome::Migrated => {
                eprintln!("thermocline: the guest runs at the destination now");
                Ok(())
            }
            Outcome::NotArrived(e) => Err(Self::new(ExitCode::of_destination(&e), e)),
        }
    }
}

impl From<anyhow::Error> for End {
    fn from(error: anyhow::Error) -> Self {
        Self { error, code: ExitCode::Failure }
    }
}

impl From<ConfigError> for End {
    fn from(e: ConfigError) -> Self {
        Self::new(ExitCode::of_config(&e), e)
    }
}

impl From<ClientError> for End {
    fn from(e: ClientError) -> Self {
        match &e {
            // The codes of the monitor's table; anything else would be a monitor of another release.
            ClientError::Failed(failure) => Self::new(ExitCode::from_number(failure.exit_code), e),
            _ => Self::new(ExitCode::Failure, e),
        }
    }
}
