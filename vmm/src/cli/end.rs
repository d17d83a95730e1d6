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

impl std::fmt::Display for End {
    /// The sentence with its causes; those that a sentence has in it already are not said twice.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = String::new();
        for cause in self.error.chain().map(ToString::to_string) {
            if text.is_empty() {
                text = cause;
            } else if !text.contains(&cause) {
                text = format!("{text}: {cause}");
            }
        }
        f.write_str(&text)
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

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn nothing_is_said_twice() {
        let io = std::io::Error::other("broken");
        let sentence = crate::control::client::ClientError::Io(io);
        let end = End::from(Err::<(), _>(sentence).context("while asking").unwrap_err());
        assert_eq!(end.to_string(), "while asking: the connection to the monitor failed: broken");
    }
}
