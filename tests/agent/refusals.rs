//! What cannot be done: a sentence and a code.

use anyhow::{Result, ensure};
use thermocline_tests::agent::{fails, run};
use thermocline_tests::binary::memory_agent;
use thermocline_tests::process::{Process, Standard};
use thermocline_tests::{Trials, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [], a_process_that_is_not_there_is_told_apart);
    trial!(trials, [], a_process_without_shared_memory_is_told);
    trial!(trials, [], wrong_command_lines_are_told_apart);
    trial!(trials, [], help_and_version_are_there);
}

/// Every subcommand, with what it needs besides a process.
const ALL: [(&[&str], &[&str]); 8] = [
    (&["map"], &[]),
    (&["watch"], &[]),
    (&["page-out"], &["--all"]),
    (&["scan", "hash"], &[]),
    (&["scan", "zero"], &[]),
    (&["scan", "dump", "/nowhere/dump"], &[]),
    (&["guard"], &[]),
    (&["daemon"], &[]),
];

fn a_process_that_is_not_there_is_told_apart() -> Result<()> {
    // More than PID_MAX_LIMIT (include/linux/threads.h): never a process.
    for pid in [4_194_305, 0, u32::MAX] {
        for (words, more) in ALL {
            let said = fails(3, words, pid, more)?;
            ensure!(said.contains(&format!("no process {pid}")), "{words:?}: {said}");
        }
    }
    Ok(())
}

fn a_process_without_shared_memory_is_told() -> Result<()> {
    let sleeper = Process::start("sleep", &["sleep".into(), "60".into()], Standard::Pipes)?;
    for (words, more) in ALL {
        let said = fails(1, words, sleeper.pid(), more)?;
        ensure!(said.contains("shared memory"), "{words:?}: {said}");
    }
    Ok(())
}

fn wrong_command_lines_are_told_apart() -> Result<()> {
    let wrong: [(&[&str], &[&str]); 8] = [
        (&["nonsense"], &[]),
        (&["scan"], &[]),
        (&["page-out"], &[]),
        (&["page-out"], &["--all", "--idle", "1s"]),
        (&["guard"], &["--interval", "0ms"]),
        (&["watch"], &["--interval", "soon"]),
        (&["map"], &["--probe", "crystal-ball"]),
        (&["daemon"], &["--budget", "0"]),
    ];
    for (words, more) in wrong {
        let (ended, lines) = run(words, std::process::id(), more)?;
        ensure!(ended.code() == Some(2) && lines.is_empty(), "{words:?} {more:?}: {ended:?}");
    }
    Ok(())
}

fn help_and_version_are_there() -> Result<()> {
    for option in ["--help", "--version"] {
        let process = Process::start("help", &[memory_agent()?.into(), option.into()], Standard::Pipes)?;
        let ended = process.wait()?;
        ensure!(ended.code() == Some(0) && !process.stdout.is_empty(), "{option}: {ended:?}");
        for (words, _) in ALL {
            ensure!(option == "--version" || process.stdout.lines().join("\n").contains(words[0]), "{words:?}");
        }
    }
    Ok(())
}
