//! A disk of the embedded guest: its image, and what the guest and the image say of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use workload_guest::Line;
use workload_guest::block::{self, BLOCK, Content};
use workload_guest::device_report::{Disk as Counts, DiskDone};

use crate::machine::{Destination, Machine, Sandbox, Workload};

/// A disk that the guest calls `disk0`.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// How much of it the guest uses, bytes.
    pub bytes: u64,
    /// More of what is said of it behind its path, such as `,direct`.
    pub options: String,
}

impl Disk {
    /// With a new image, a hole of twice the size.
    ///
    /// # Errors
    /// When there is no room for it.
    pub fn new(path: &Path, bytes: u64, options: &str) -> Result<Self> {
        File::create_new(path)?.set_len(2 * bytes)?;
        Ok(Self { path: path.into(), bytes, options: options.into() })
    }

    /// What stands behind `--disk`.
    pub fn option(&self) -> String {
        format!("path={}{}", self.path.display(), self.options)
    }

    /// Starts a small guest with this disk; `guest` are its further options, each with a comma before it.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn boot(&self, sandbox: &Sandbox, guest: &str) -> Result<Machine> {
        sandbox.boot_devices(&[], &format!("disk={}{guest}", self.bytes), &["--disk", &self.option()])
    }

    /// Starts the other side with this disk, which ends at whatever fails first.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn receive(&self, sandbox: &Sandbox, workload: &Workload) -> Result<Destination> {
        sandbox.receive_on("tcp:127.0.0.1:0", &["--disk", &self.option()], workload)
    }

    /// What a block holds by the image.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn content(&self, number: u64) -> Result<Content> {
        let mut bytes = vec![0; BLOCK as usize];
        File::open(&self.path)?.read_exact_at(&mut bytes, number * BLOCK)?;
        let words: Vec<_> = bytes.chunks_exact(8).map(|word| word.try_into().map(u64::from_le_bytes)).collect();
        Ok(block::read(number, 1, |index| words[index].unwrap_or_default()))
    }
}

/// The end of a job, if the line is one.
pub fn done(line: Line) -> Option<DiskDone> {
    if let Line::DiskDone(done) = line { Some(done) } else { None }
}

/// Has the disk do something, of which nothing may fail.
///
/// # Errors
/// When something does, or the guest does not answer.
pub fn job(machine: &mut Machine, command: &str) -> Result<DiskDone> {
    let done = machine.console.device(command, done)?;
    ensure!(done.errors + done.bad + done.repeated == 0, "{command}: {done:?}");
    Ok(done)
}

/// The guest's next counts.
///
/// # Errors
/// When none come.
pub fn counts(machine: &Machine) -> Result<Counts> {
    machine.console.next(|line| if let Line::Disk(counts) = line { Some(counts) } else { None })
}

/// Ends the disk's job, and checks that every request since boot was answered once and well, and that the image holds what was
/// written: by the guest, which remembers, and by the image itself. All blocks have been written once.
///
/// # Errors
/// When it is otherwise.
pub fn must_be_right(machine: &mut Machine, disk: &Disk) -> Result<()> {
    let ended = job(machine, "disk-stop").context("not all requests are answered")?;
    ensure!(ended.requests > 32, "it was not at work: {ended:?}");
    job(machine, "disk-flush")?;
    let counts = counts(machine)?;
    ensure!(counts.errors + counts.bad + counts.repeated == 0 && counts.under_way == 0, "{counts:?}");
    let read = job(machine, "disk read sequential 65536 4 once")?;
    let blocks = disk.bytes / BLOCK;
    ensure!(read.known == blocks, "of {blocks} blocks: {read:?}");
    for number in 0..blocks {
        let content = disk.content(number)?;
        ensure!(matches!(content, Content::Generation(1..)), "block {number} on the image: {content:?}");
    }
    Ok(())
}
