//! What several subcommands say, and how.

use std::fmt::Display;

use command_line::Program;
use memory_agent::{ByteSize, PAGE_SIZE};

/// This program.
pub(crate) const PROGRAM: Program = Program::new("memory-agent");

/// Says something to whoever looks at the terminal or reads the log.
pub(crate) fn say(text: impl Display) {
    PROGRAM.say(text);
}

/// So many pages as a size.
pub(crate) fn size(pages: u64) -> ByteSize {
    ByteSize(pages * PAGE_SIZE)
}
