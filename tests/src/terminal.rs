//! A terminal such as a person sits at: a pseudo-terminal with its settings.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::Result;
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{Termios, tcgetattr};

/// A terminal: the person's end and the program's.
#[derive(Debug)]
pub struct Terminal {
    /// What a person sees, and types.
    pub person: File,
    program: OwnedFd,
}

impl Terminal {
    /// A new one.
    ///
    /// # Errors
    /// When the host has none left.
    pub fn new() -> Result<Self> {
        let person = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::grantpt(&person)?;
        rustix::pty::unlockpt(&person)?;
        let path: CString = rustix::pty::ptsname(&person, Vec::new())?;
        let program = rustix::fs::open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { person: person.into(), program })
    }

    /// For a process's standard input and output.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn for_program(&self) -> Result<OwnedFd> {
        Ok(self.program.try_clone()?)
    }

    /// Its settings now.
    ///
    /// # Errors
    /// When the host does not say.
    pub fn settings(&self) -> Result<Termios> {
        Ok(tcgetattr(&self.program)?)
    }
}
