//! Running trials: one at a time, each with a deadline, and those that cannot run here named one by one.

use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::host::{self, Need};
use crate::process::{EMULATED, SLOWER};
use crate::stop::{self, locked};
use crate::{process, swap};

/// How long a trial may take.
pub const LIMIT: Duration = Duration::from_secs(60 * SLOWER);
/// How long a trial may take to notice that its processes have been killed.
const GRACE: Duration = Duration::from_secs(20 * SLOWER);

/// Set, each trial's time is printed.
const TIMES: &str = "THERMOCLINE_TESTS_TIMES";

/// All trials of one test binary.
#[derive(Default)]
pub struct Trials(Vec<Trial>);

/// One more for a list of trials: a name, what it needs, and what it does.
#[macro_export]
macro_rules! trial {
    ($trials:expr, [$($need:ident),*], $function:path) => {
        $trials.add(stringify!($function), &[$($crate::Need::$need),*], $function)
    };
}

impl Trials {
    /// Adds a trial.
    pub fn add(&mut self, name: &str, needs: &'static [Need], body: fn() -> Result<()>) {
        let name = name.to_owned();
        let shown = name.clone();
        self.0.push(Trial::ignorable_test(name, move || {
            let missing = needs.iter().find_map(|need| Some((*need, host::missing(*need)?)));
            if let Some((need, why)) = missing {
                if harness::host::must_run_with_kvm() && !need.cannot_be_had() {
                    return Err(Failed::from(format!("nothing may be left out with CI=true on this machine: {why}")));
                }
                eprintln!("ignored {shown}: {why}");
                return Ok(Completion::ignored_with(why));
            }
            let started = Instant::now();
            let end = within_limit(body);
            if std::env::var_os(TIMES).is_some() {
                eprintln!("{:6.1} s  {shown}", started.elapsed().as_secs_f64());
            }
            end.map(|()| Completion::Completed)
        }));
    }

    /// Runs what the command line asks for, and gives the code to exit with.
    pub fn run(self) -> ExitCode {
        stop::on_signals();
        let mut arguments = Arguments::from_args();
        // Swap, and the two cores of a small machine, are shared by all trials.
        arguments.test_threads = Some(1);
        if !arguments.list {
            // Outside of any trial's time; one that needs it says why there is none.
            let _ = crate::binary::thermocline();
        }
        let conclusion = libtest_mimic::run(&arguments, self.0);
        if let Err(e) = swap::close() {
            eprintln!("the swap device of these tests is still on: {e}");
            return ExitCode::FAILURE;
        }
        conclusion.exit_code()
    }
}

/// When the trial that runs has to be done.
static DEADLINE: Mutex<Option<Instant>> = Mutex::new(None);

/// The trial has its whole time again: it is repeated, or does the same many times.
pub fn give_more_time() {
    *locked(&DEADLINE) = Some(Instant::now() + LIMIT);
}

/// Runs a body whose guest may end because its processor is emulated, and then again, a few times.
///
/// QEMU 7.2 without KVM sometimes goes on in a nested guest, after an exit from it, with the host's instruction pointer,
/// stack and interrupt table; the guest ends in a triple fault. See docs/host-kernel.md.
///
/// # Errors
/// The last failure, or one that has another reason.
pub fn unless_the_emulator_fails(mut body: impl FnMut() -> Result<()>) -> Result<()> {
    const ATTEMPTS: u32 = 4;
    for attempt in 1.. {
        process::forget_transcripts();
        match body() {
            Err(e) if EMULATED && attempt < ATTEMPTS && process::transcripts().contains("triple fault") => {
                println!("repeated, because the emulator has lost the guest: {e:#}");
                give_more_time();
            }
            end => return end,
        }
    }
    Ok(())
}

fn within_limit(body: fn() -> Result<()>) -> Result<(), Failed> {
    process::forget_transcripts();
    give_more_time();
    let (done, waits) = channel::<()>();
    let late = Arc::new(Mutex::new(false));
    let watchdog = {
        let late = Arc::clone(&late);
        std::thread::spawn(move || {
            loop {
                let deadline = *locked(&DEADLINE);
                let left = deadline.map_or(Duration::ZERO, |d| d.saturating_duration_since(Instant::now()));
                match waits.recv_timeout(left) {
                    Err(RecvTimeoutError::Timeout) if *locked(&DEADLINE) == deadline => break,
                    Err(RecvTimeoutError::Timeout) => {}
                    _ => return,
                }
            }
            *locked(&late) = true;
            // Whoever waits for a process sees it end.
            stop::kill_all();
            if waits.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("a trial hangs though its processes are gone; what they said:\n{}", process::transcripts());
                harness::network::remove_all();
                let _ = swap::close();
                std::process::exit(101);
            }
        })
    };
    let result = std::panic::catch_unwind(body);
    drop(done);
    let _ = watchdog.join();
    let why = match result {
        Ok(Ok(())) if !*locked(&late) => return Ok(()),
        Ok(Ok(())) => String::new(),
        Ok(Err(e)) => format!("{e:#}"),
        Err(panic) => match panic.downcast_ref::<&str>() {
            Some(text) => format!("panicked: {text}"),
            None => format!("panicked: {}", panic.downcast_ref::<String>().map_or("?", String::as_str)),
        },
    };
    let late = if *locked(&late) { format!("took longer than {LIMIT:?}; ") } else { String::new() };
    Err(Failed::from(format!("{late}{why}\n{}", process::transcripts())))
}
