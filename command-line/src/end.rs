//! How a program ends when it does not succeed: a sentence for people, and a code for scripts.

use std::fmt;

use crate::output::OutputError;

/// Anything without a code of its own, as most programs have it.
const FAILURE: u8 = 1;

/// An end that has something other to say than that all is well.
#[derive(Debug)]
pub struct End {
    sentence: Option<anyhow::Error>,
    code: u8,
}

impl End {
    /// An end with this sentence and code.
    pub fn new(code: impl Into<u8>, error: impl Into<anyhow::Error>) -> Self {
        Self { sentence: Some(error.into()), code: code.into() }
    }

    /// An end with this sentence and code.
    pub fn text(code: impl Into<u8>, text: impl Into<String>) -> Self {
        Self::new(code, anyhow::Error::msg(text.into()))
    }

    /// An end of which all has been said, such as by a command that was run.
    pub fn silent(code: impl Into<u8>) -> Self {
        Self { sentence: None, code: code.into() }
    }

    /// The code to exit with.
    pub fn code(&self) -> u8 {
        self.code
    }

    /// Whether there is something to say.
    pub fn is_silent(&self) -> bool {
        self.sentence.is_none()
    }
}

impl fmt::Display for End {
    /// The sentence behind what was being done, in one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sentence.as_ref().map_or(Ok(()), |sentence| write!(f, "{sentence:#}"))
    }
}

impl From<anyhow::Error> for End {
    fn from(error: anyhow::Error) -> Self {
        Self::new(FAILURE, error)
    }
}

impl From<OutputError> for End {
    fn from(error: OutputError) -> Self {
        match error {
            OutputError::ReaderGone => Self::silent(0),
            error => Self::new(FAILURE, error),
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn what_was_being_done_stands_before_what_went_wrong() {
        let end = End::from(Err::<(), _>(anyhow::Error::msg("no room")).context("no console").unwrap_err());
        assert_eq!((end.to_string().as_str(), end.code()), ("no console: no room", 1));
    }

    #[test]
    fn a_reader_that_has_gone_is_no_failure() {
        let end = End::from(OutputError::ReaderGone);
        assert_eq!((end.is_silent(), end.code(), end.to_string().as_str()), (true, 0, ""));
        assert_eq!(End::from(OutputError::Write(std::io::ErrorKind::StorageFull.into())).code(), 1);
    }
}
