//! Standard output, which whoever reads may close when they have seen enough, as `head` does.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use serde::Serialize;

/// Why something was not printed.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// Whoever read it has seen enough. For a program that only prints this is a success.
    #[error("nobody reads standard output any more")]
    ReaderGone,
    /// It cannot be written to, such as a file on a full disk.
    #[error("cannot write to standard output: {0}")]
    Write(std::io::Error),
    /// The object is not one that JSON can hold.
    #[error("this cannot be written as JSON: {0}")]
    Json(serde_json::Error),
}

/// Prints a text as it is, at once.
///
/// # Errors
/// When nobody reads any more, or it cannot be written.
pub fn print(text: &str) -> Result<(), OutputError> {
    write(&mut std::io::stdout().lock(), text)
}

/// Prints one JSON object as a line.
///
/// # Errors
/// As [`print()`].
pub fn print_json(object: &impl Serialize) -> Result<(), OutputError> {
    print(&json_line(object)?)
}

/// Prints what came of work that is done: the work is not undone because nobody reads that.
///
/// # Errors
/// When it cannot be written.
pub fn print_result(text: &str) -> Result<(), OutputError> {
    Output::default().print(text)
}

fn json_line(object: &impl Serialize) -> Result<String, OutputError> {
    Ok(serde_json::to_string(object).map_err(OutputError::Json)? + "\n")
}

fn write(to: &mut impl Write, text: &str) -> Result<(), OutputError> {
    to.write_all(text.as_bytes()).and_then(|()| to.flush()).map_err(|e| match e.kind() {
        ErrorKind::BrokenPipe => OutputError::ReaderGone,
        _ => OutputError::Write(e),
    })
}

/// Standard output of work that goes on when nobody reads any more: what is printed from then on goes nowhere.
#[derive(Debug, Default)]
pub struct Output {
    reader_gone: bool,
}

impl Output {
    /// Prints a text as it is, at once.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn print(&mut self, text: &str) -> Result<(), OutputError> {
        self.print_to(&mut std::io::stdout().lock(), text)
    }

    /// Prints a line.
    ///
    /// # Errors
    /// As [`Output::print`].
    pub fn line(&mut self, line: impl Display) -> Result<(), OutputError> {
        self.print(&format!("{line}\n"))
    }

    /// Prints one JSON object as a line.
    ///
    /// # Errors
    /// As [`Output::print`].
    pub fn print_json(&mut self, object: &impl Serialize) -> Result<(), OutputError> {
        self.print(&json_line(object)?)
    }

    fn print_to(&mut self, to: &mut impl Write, text: &str) -> Result<(), OutputError> {
        if self.reader_gone {
            return Ok(());
        }
        match write(to, text) {
            Err(OutputError::ReaderGone) => {
                self.reader_gone = true;
                Ok(())
            }
            written => written,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// Fails with `kind` once it has taken `room` writes.
    struct Pipe {
        room: usize,
        kind: ErrorKind,
        attempts: usize,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.attempts += 1;
            if self.attempts > self.room { Err(self.kind.into()) } else { Ok(bytes.len()) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn work_goes_on_when_its_reader_has_gone() {
        let mut pipe = Pipe { room: 1, kind: ErrorKind::BrokenPipe, attempts: 0 };
        let mut output = Output::default();
        for _ in 0..5 {
            output.print_to(&mut pipe, "line\n").unwrap();
        }
        assert_eq!(pipe.attempts, 2, "nothing is written to a pipe without a reader");
    }

    #[test]
    fn a_full_disk_is_an_error_and_a_reader_that_has_gone_is_told() {
        let mut disk = Pipe { room: 0, kind: ErrorKind::StorageFull, attempts: 0 };
        assert!(matches!(Output::default().print_to(&mut disk, "x"), Err(OutputError::Write(_))));
        let mut pipe = Pipe { room: 0, kind: ErrorKind::BrokenPipe, attempts: 0 };
        assert!(matches!(write(&mut pipe, "x"), Err(OutputError::ReaderGone)));
    }
}
