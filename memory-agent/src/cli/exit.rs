//! The codes that scripts tell one end from another by.

use command_line::End;
use memory_agent::{AgentError, GuardError, PageOutError, ProbeError, ScanError, TargetError};

use super::idle::IdleError;

/// The codes this program exits with. `guard -- COMMAND` exits with the command's code instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ExitCode {
    /// Done.
    Success = 0,
    /// Anything without a code of its own.
    Failure = 1,
    /// The command line is wrong.
    Usage = 2,
    /// There is no such process, it has ended, or it does not map the memory any more.
    Gone = 3,
    /// This user may not do that.
    NoRight = 4,
    /// There is no swap, or no room in it.
    NoSwap = 5,
    /// The command to run under guard cannot be started, as shells and `env` have it.
    NoCommand = 127,
    /// Interrupted by a signal, before it was done.
    Interrupted = 130,
}

impl From<ExitCode> for u8 {
    fn from(code: ExitCode) -> Self {
        code as Self
    }
}

/// The end that an error of the library means.
pub(crate) fn end_of(error: impl Coded) -> End {
    End::new(error.code(), error)
}

/// An error of the library, which has a code.
pub(crate) trait Coded: std::error::Error + Send + Sync + 'static {
    /// What it says of the process's memory, if that is what it is about.
    fn target(&self) -> Option<&TargetError>;

    /// Its code, when it is about something else.
    fn other_code(&self) -> ExitCode {
        ExitCode::Failure
    }

    /// Its code.
    fn code(&self) -> ExitCode {
        match self.target() {
            None => self.other_code(),
            Some(TargetError::NoProcess(_) | TargetError::Exited(_) | TargetError::Remapped { .. }) => ExitCode::Gone,
            Some(TargetError::NoRight { .. } | TargetError::NotWritable) => ExitCode::NoRight,
            Some(TargetError::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::PermissionDenied => {
                ExitCode::NoRight
            }
            Some(_) => ExitCode::Failure,
        }
    }

    /// Whether the process has ended: for whoever stays with one as long as it is there, that is no failure.
    fn is_end_of_process(&self) -> bool {
        matches!(self.target(), Some(TargetError::Exited(_)))
    }
}

impl Coded for TargetError {
    fn target(&self) -> Option<&TargetError> {
        Some(self)
    }
}

impl Coded for ProbeError {
    fn target(&self) -> Option<&TargetError> {
        if let Self::Target(e) = self { Some(e) } else { None }
    }
}

impl Coded for PageOutError {
    fn target(&self) -> Option<&TargetError> {
        match self {
            Self::Probe(e) => e.target(),
            Self::Target(e) => Some(e),
            _ => None,
        }
    }

    fn other_code(&self) -> ExitCode {
        match self {
            Self::NoSwap | Self::SwapFull(_) | Self::GroupSwapFull(_) => ExitCode::NoSwap,
            _ => ExitCode::Failure,
        }
    }
}

impl Coded for ScanError {
    fn target(&self) -> Option<&TargetError> {
        match self {
            Self::Probe(e) => e.target(),
            Self::PageOut(e) => e.target(),
            Self::Target(e) => Some(e),
            _ => None,
        }
    }

    fn other_code(&self) -> ExitCode {
        if let Self::PageOut(e) = self { e.other_code() } else { ExitCode::Failure }
    }
}

impl Coded for GuardError {
    fn target(&self) -> Option<&TargetError> {
        match self {
            Self::Probe(e) => e.target(),
            Self::PageOut(e) => e.target(),
            Self::Target(e) => Some(e),
            Self::OtherMemory { .. } => None,
        }
    }

    fn other_code(&self) -> ExitCode {
        match self {
            Self::PageOut(e) => e.other_code(),
            Self::OtherMemory { .. } => ExitCode::Usage,
            _ => ExitCode::Failure,
        }
    }
}

impl Coded for AgentError {
    fn target(&self) -> Option<&TargetError> {
        if let Self::Probe(e) = self { e.target() } else { None }
    }

    fn other_code(&self) -> ExitCode {
        if let Self::Budget(_) = self { ExitCode::Usage } else { ExitCode::Failure }
    }
}

impl Coded for IdleError {
    fn target(&self) -> Option<&TargetError> {
        if let Self::Target(e) = self { Some(e) } else { None }
    }

    fn other_code(&self) -> ExitCode {
        if let Self::NoRight = self { ExitCode::NoRight } else { ExitCode::Failure }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    #[test]
    fn a_code_is_found_however_deep_its_reason_is() {
        let ended = || TargetError::Exited(1);
        assert_eq!(GuardError::PageOut(PageOutError::Probe(ProbeError::Target(ended()))).code(), ExitCode::Gone);
        assert_eq!(ScanError::PageOut(PageOutError::Target(ended())).code(), ExitCode::Gone);
        assert_eq!(ScanError::PageOut(PageOutError::SwapFull(1)).code(), ExitCode::NoSwap);
        assert_eq!(AgentError::Probe(ProbeError::Target(TargetError::NotWritable)).code(), ExitCode::NoRight);
        let denied = TargetError::Io { what: "open", path: "x".into(), cause: ErrorKind::PermissionDenied.into() };
        assert_eq!(denied.code(), ExitCode::NoRight);
        assert_eq!(GuardError::PageOut(PageOutError::NoSwap).code(), ExitCode::NoSwap);
        assert_eq!(GuardError::OtherMemory { map: 1, memory: 2 }.code(), ExitCode::Usage);
        assert!(ProbeError::Target(ended()).is_end_of_process());
        assert!(!TargetError::NoProcess(1).is_end_of_process());
        assert_eq!(end_of(PageOutError::Kept(1)).code(), 1);
    }
}
