//! The other end of a console: this terminal, a file or a pseudo-terminal.

mod consoles;
mod line;

pub use consoles::Consoles;
pub(crate) use line::Line;

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::str::FromStr;

use rustix::fs::OFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::{self, LocalModes, OptionalActions, Termios};

use crate::devices::host::ConsoleOutput;
use crate::record::Name;

/// Where a console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Standard input and output.
    Stdio,
    /// A file, output only.
    File(PathBuf),
    /// A new pseudo-terminal.
    Pty,
}

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Not one of the targets.
    #[error("'{0}' is not a console: write stdio, file=PATH or pty")]
    Target(String),
    /// Two want this terminal.
    #[error(
        "the consoles {0} and {1} cannot both be on standard input and output: give one of them another target, such as pty"
    )]
    Twice(Name, Name),
    /// The file or terminal cannot be had.
    #[error("the console {what} cannot be opened: {cause}")]
    Open {
        /// Which.
        what: String,
        /// What the host said.
        cause: io::Error,
    },
}

impl FromStr for ConsoleTarget {
    type Err = ConsoleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text, text.strip_prefix("file=")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("pty", _) => Ok(Self::Pty),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(ConsoleError::Target(text.into())),
        }
    }
}

/// An open console.
#[derive(Debug)]
pub struct Console {
    input: Option<ConsoleInput>,
    output: Option<File>,
    /// Path of the pseudo-terminal for others to open.
    pub pty: Option<PathBuf>,
}

impl Console {
    /// Opens the target. A terminal on standard input gives its characters one by one from now until this is dropped.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(target: &ConsoleTarget) -> Result<Self, ConsoleError> {
        match target {
            ConsoleTarget::Stdio => {
                let error = |cause| ConsoleError::Open { what: "on standard output".into(), cause };
                let output = io::stdout().as_fd().try_clone_to_owned().map_err(error)?;
                let input = ConsoleInput { fd: Input::Stdin, terminal: CharacterMode::enter() };
                Ok(Self { input: Some(input), output: Some(output.into()), pty: None })
            }
            ConsoleTarget::File(path) => {
                let output = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .map_err(|cause| ConsoleError::Open { what: format!("file {}", path.display()), cause })?;
                Ok(Self { input: None, output: Some(output), pty: None })
            }
            ConsoleTarget::Pty => {
                open_pty().map_err(|e| ConsoleError::Open { what: "pseudo-terminal".into(), cause: e.into() })
            }
        }
    }

    /// The end that the guest writes to; there is one.
    pub fn take_output(&mut self) -> ConsoleOutput {
        match self.output.take() {
            Some(file) if self.pty.is_some() => ConsoleOutput::new(Lossy(file)),
            Some(file) => ConsoleOutput::new(file),
            None => ConsoleOutput::new(io::sink()),
        }
    }

    /// The end that the guest reads from, if there is one.
    pub fn take_input(&mut self) -> Option<ConsoleInput> {
        self.input.take()
    }
}

fn open_pty() -> rustix::io::Result<Console> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let path = PathBuf::from(rustix::pty::ptsname(&master, Vec::new())?.to_string_lossy().into_owned());
    // Kept open so that the terminal does not hang up whenever its last user leaves, and set raw once for all of them.
    let slave = rustix::fs::open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    let mut modes = termios::tcgetattr(&slave)?;
    modes.make_raw();
    termios::tcsetattr(&slave, OptionalActions::Now, &modes)?;
    let flags = rustix::fs::fcntl_getfl(&master)?;
    rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK)?;
    let output = master.try_clone().map_err(|_| rustix::io::Errno::MFILE)?;
    let input = ConsoleInput { fd: Input::Pty { master, _slave: slave }, terminal: None };
    Ok(Console { input: Some(input), output: Some(output.into()), pty: Some(path) })
}

/// A pseudo-terminal that nobody reads fills up; then bytes are lost rather than the guest stopped.
struct Lossy(File);

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where the guest's input comes from.
#[derive(Debug)]
pub struct ConsoleInput {
    fd: Input,
    /// Gives the terminal back when dropped.
    #[allow(dead_code, reason = "held for its drop")]
    terminal: Option<CharacterMode>,
}

#[derive(Debug)]
enum Input {
    Stdin,
    Pty { master: OwnedFd, _slave: OwnedFd },
}

impl ConsoleInput {
    /// Reads what is there, at most `buffer`; 0 at the end.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.as_fd(), buffer)?)
    }
}

impl AsFd for ConsoleInput {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Input::Stdin => rustix::stdio::stdin(),
            Input::Pty { master, .. } => master.as_fd(),
        }
    }
}

impl AsRawFd for ConsoleInput {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// A terminal without line editing and echo. Ctrl-C still interrupts.
struct CharacterMode(Termios);

impl std::fmt::Debug for CharacterMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CharacterMode")
    }
}

impl CharacterMode {
    /// `None` when standard input is no terminal.
    fn enter() -> Option<Self> {
        let stdin = rustix::stdio::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = termios::tcgetattr(stdin).ok()?;
        let mut modes = before.clone();
        modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        termios::tcsetattr(stdin, OptionalActions::Now, &modes).ok()?;
        Some(Self(before))
    }
}

impl Drop for CharacterMode {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn targets_are_read_as_written() {
        assert_eq!("stdio".parse::<ConsoleTarget>().unwrap(), ConsoleTarget::Stdio);
        assert_eq!("file=/tmp/x".parse::<ConsoleTarget>().unwrap(), ConsoleTarget::File("/tmp/x".into()));
        assert!("file=".parse::<ConsoleTarget>().is_err());
        assert!("modem".parse::<ConsoleTarget>().is_err());
    }

    #[test]
    fn a_pty_carries_bytes_both_ways_and_never_blocks() {
        let mut console = Console::open(&ConsoleTarget::Pty).unwrap();
        let path = console.pty.clone().unwrap();
        let (mut output, input) = (console.take_output(), console.take_input().unwrap());
        let mut user = OpenOptions::new().read(true).write(true).open(path).unwrap();
        output.write_all(b"login:").unwrap();
        let mut bytes = [0; 6];
        user.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"login:");
        user.write_all(b"me").unwrap();
        let mut bytes = [0; 2];
        assert_eq!(input.read(&mut bytes).unwrap(), 2);
        for _ in 0..1000 {
            output.write_all(&[b'x'; 1000]).unwrap();
        }
    }
}
