//! `guest-check`: checks a Linux guest from inside, and says on its console what each check came to.
//!
//! `guest-check CHECK[:ARGUMENT]…` in their order; `console` takes further ones from standard input, a line each.

mod checks;

use std::io::{BufRead, Write};
use std::process::ExitCode;

use linux_guest::Said;

/// What a check has found, or why it failed.
type Outcome = Result<String, String>;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.is_empty() {
        say(&Said::Failed {
            check: "guest-check".into(),
            why: format!("nothing to check; there are {}", checks::names()),
        });
        return ExitCode::FAILURE;
    }
    let failed = arguments.iter().filter(|argument| !run(argument)).count();
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs one check; whether it has passed.
fn run(argument: &str) -> bool {
    let (name, argument) = argument.split_once(':').unwrap_or((argument, ""));
    if name == "console" {
        return console();
    }
    let check = name.to_owned();
    match checks::run(name, argument) {
        Ok(found) => say(&Said::Passed { check, found }),
        Err(why) => {
            say(&Said::Failed { check, why });
            return false;
        }
    }
    true
}

/// Runs what is typed, until the end of the console.
fn console() -> bool {
    news("console", "waits");
    let mut passed = true;
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        for check in line.split_whitespace() {
            passed &= run(check);
        }
    }
    passed
}

/// Says news of a check.
fn news(check: &str, text: &str) {
    say(&Said::News { check: check.into(), text: text.into() });
}

/// Says a line, whole.
fn say(said: &Said) {
    let mut console = std::io::stdout().lock();
    // With no console there is nobody to tell that there is none.
    let _ = console.write_all(format!("{said}\n").as_bytes()).and_then(|()| console.flush());
}
