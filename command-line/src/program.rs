//! What a program says on standard error: messages with its name in front, and its log.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::end::End;

/// Says something that needs no name in front, such as how far it is. When nobody can hear it, the program goes on.
pub fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A program, by the name that stands in front of what it says.
#[derive(Clone, Copy, Debug)]
pub struct Program(&'static str);

impl Program {
    /// The program of this name.
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// Says something to whoever looks at the terminal or reads the log. When nobody can hear it, the program goes on.
    pub fn say(self, text: impl Display) {
        let _ = writeln!(std::io::stderr(), "{}: {text}", self.0);
    }

    /// Sends the log to standard error, each line with its time (UTC) and the spans that it is about. The environment
    /// variable `filter` says what is logged, as `tracing_subscriber::EnvFilter` has it; warnings where it is not set.
    pub fn log(self, filter: &str) {
        let filter = EnvFilter::try_from_env(filter).unwrap_or_else(|_| EnvFilter::new("warn"));
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal());
        // Whoever has set another one up before wants that one.
        let _ = subscriber.try_init();
    }

    /// Says what there is to say of an end, and gives the code to exit with.
    pub fn end(self, result: Result<(), End>) -> ExitCode {
        let Err(end) = result else { return ExitCode::SUCCESS };
        if !end.is_silent() {
            self.say(&end);
        }
        ExitCode::from(end.code())
    }
}
