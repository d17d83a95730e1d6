//! apt-get, which other programs use too: one at a time.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use command_line::note;

use crate::step::{program, shown};

/// How long others may take with their packages.
const TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// How often to try again. Which of several files is locked, and how, is apt's own affair, so that there is nothing to wait on.
const PAUSE: Duration = Duration::from_secs(1);

/// Renews the lists of packages.
///
/// # Errors
/// As [`install`].
pub(crate) fn update() -> Result<()> {
    run(apt_get().arg("update"), TIMEOUT)
}

/// Installs packages.
///
/// # Errors
/// When apt-get fails, or others keep its locks for a quarter of an hour.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    // Lists that are there may do when they cannot be renewed; the installation tells.
    if let Err(e) = update() {
        note(format_args!("{e:#}; going on with the package lists that are there"));
    }
    run(apt_get().args(["install", "--yes", "--no-install-recommends"]).args(packages), TIMEOUT)
}

fn apt_get() -> Command {
    let mut apt = program("apt-get");
    // What it says about locks is looked at.
    apt.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C").arg("--quiet=2");
    apt
}

/// Runs apt-get, again and again while another program holds its locks.
fn run(command: &mut Command, patience: Duration) -> Result<()> {
    let name = shown(command);
    note(format_args!("$ {name}"));
    let started = Instant::now();
    let mut waits = false;
    loop {
        let mut child =
            command.stderr(Stdio::piped()).spawn().with_context(|| format!("`{name}` cannot be started"))?;
        let mut said = Vec::new();
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_end(&mut said)?;
        }
        let status = child.wait()?;
        let said_text = String::from_utf8_lossy(&said);
        if status.success() || !is_locked(&said_text) {
            std::io::stderr().write_all(&said)?;
            if !status.success() {
                bail!("`{name}` failed: {status}");
            }
            return Ok(());
        }
        let why = said_text.lines().next().unwrap_or_default().trim_start_matches("E: ");
        if started.elapsed() >= patience {
            bail!(
                "`{name}` was given up after {} s, because another program holds apt's locks: {why}",
                patience.as_secs()
            );
        }
        if !waits {
            note(format_args!("another program is installing packages: waiting for it ({why})"));
            waits = true;
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether that is what apt-get says when somebody else is at it.
fn is_locked(said: &str) -> bool {
    // Of the lists and the archive; of dpkg's front ends; of dpkg itself.
    ["Could not get lock ", "Unable to acquire the dpkg frontend lock", "Unable to lock the administration directory"]
        .iter()
        .any(|sentence| said.contains(sentence))
        // Who may not, has nobody to wait for.
        && !said.contains("Permission denied")
        && !said.contains("are you root?")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// As apt-get, whose lock is a folder: whoever makes it has it.
    fn pretended(lock: &std::path::Path) -> Command {
        let mut command = Command::new("sh");
        let locked = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)";
        command
            .arg("-c")
            .arg(format!("mkdir '{0}' 2>/dev/null || {{ echo '{locked}' >&2; exit 100; }}", lock.display()));
        command
    }

    #[test]
    fn it_waits_for_whoever_has_the_lock() {
        let folder = tempfile::TempDir::new().unwrap();
        let lock = folder.path().join("lock");
        fs::create_dir(&lock).unwrap();
        let e = run(&mut pretended(&lock), Duration::ZERO).unwrap_err().to_string();
        assert!(e.contains("another program holds apt's locks: Could not get lock /var/lib/apt/lists/lock."), "{e}");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| run(&mut pretended(&lock), Duration::from_secs(60)));
            fs::remove_dir(&lock).unwrap();
            waits.join().unwrap().unwrap();
        });
        assert!(lock.is_dir());
    }

    #[test]
    fn other_failures_are_told_at_once() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo 'E: Unable to locate package nothing' >&2; exit 100"]);
        let e = run(&mut command, Duration::from_secs(60)).unwrap_err().to_string();
        assert!(e.ends_with("failed: exit status: 100"), "{e}");
    }

    #[test]
    fn locks_of_others_are_known() {
        assert!(is_locked(
            "E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is another process using it?"
        ));
        let not_root = "E: Could not open lock file /var/lib/dpkg/lock-frontend - open (13: Permission denied)\n\
                        E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), are you root?";
        assert!(!is_locked(not_root));
    }
}
