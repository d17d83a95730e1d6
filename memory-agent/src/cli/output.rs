//! Standard output, which whoever reads may close when they have seen enough.

use std::io::{ErrorKind, Write};

use memory_agent::{ByteSize, PAGE_SIZE};
use serde::Serialize;

use super::exit::{End, ExitCode};

/// Prints a text as it is, at once.
///
/// # Errors
/// An end: a silent one when nobody reads any more, such as behind `| head`.
pub(crate) fn print(text: &str) -> Result<(), End> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(End::silent(ExitCode::Success as u8)),
        Err(e) => Err(End::text(ExitCode::Failure, format!("cannot write to standard output: {e}"))),
    }
}

/// Prints one JSON object as a line.
///
/// # Errors
/// As [`print`].
pub(crate) fn print_json(object: &impl Serialize) -> Result<(), End> {
    let text = serde_json::to_string(object).map_err(|e| End::new(ExitCode::Failure, e))?;
    print(&(text + "\n"))
}

/// Says something to whoever looks at the terminal or reads the log.
pub(crate) fn say(text: impl std::fmt::Display) {
    // A log that is gone is no reason to stop.
    let _ = writeln!(std::io::stderr(), "memory-agent: {text}");
}

/// So many pages as a size.
pub(crate) fn size(pages: u64) -> ByteSize {
    ByteSize(pages * PAGE_SIZE)
}
