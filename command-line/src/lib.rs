//! How this project's programs print, log and end: one way for all of them.
//!
//! | to read about | open |
//! |---|---|
//! | standard output, whose reader may go | `output.rs` |
//! | a sentence and an exit code | `end.rs` |
//! | completions and manual pages | `generated.rs` |
//! | messages and logs on standard error | `program.rs` |
//!
//! An error's sentence holds its cause, and what can be done about it stands last. Such an error does not give its
//! cause as [`std::error::Error::source`] as well, so that nothing is said twice where a chain is printed.

mod end;
mod generated;
mod output;
mod program;

pub use end::End;
pub use generated::{CompletionsArguments, ManPagesArguments, without_help};
pub use output::{Output, OutputError, print, print_json, print_result};
pub use program::{Program, note};
