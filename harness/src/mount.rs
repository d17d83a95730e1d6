//! A file system of one's own: small, and gone when it is dropped.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::network::run;

/// Programs of the host that are needed.
pub const PROGRAMS: [&str; 3] = ["mkfs.ext4", "fsfreeze", "mount"];

/// A mounted file system.
#[derive(Debug)]
pub struct Mount {
    at: PathBuf,
    is_mounted: bool,
}

impl Mount {
    fn new(at: &Path, options: &str) -> Result<Self> {
        std::fs::create_dir(at)?;
        run(&format!("mount {options} {}", at.display()))?;
        Ok(Self { at: at.into(), is_mounted: true })
    }

    /// ext4 of so many bytes at this path, where nothing is, in a file of the same name with `.ext4` behind it.
    ///
    /// # Errors
    /// When the host does not let.
    pub fn ext4(at: &Path, bytes: u64) -> Result<Self> {
        let image = at.with_extension("ext4");
        std::fs::File::create_new(&image)?.set_len(bytes)?;
        run(&format!("mkfs.ext4 -q {}", image.display()))?;
        Self::new(at, &format!("-o loop {}", image.display()))
    }

    /// tmpfs of so many bytes at this path, where nothing is.
    ///
    /// # Errors
    /// When the host does not let.
    pub fn tmpfs(at: &Path, bytes: u64) -> Result<Self> {
        Self::new(at, &format!("-t tmpfs -o size={bytes} tmpfs"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Gives a tmpfs so many bytes from now on.
    ///
    /// # Errors
    /// When the host does not let.
    pub fn grow(&self, bytes: u64) -> Result<()> {
        run(&format!("mount -o remount,size={bytes} {}", self.at.display()))
    }

    /// Lets nobody write to it (`FIFREEZE`) before what is given is dropped.
    ///
    /// # Errors
    /// When the host does not let.
    pub fn freeze(&self) -> Result<Frozen> {
        run(&format!("fsfreeze --freeze {}", self.at.display()))?;
        Ok(Frozen(self.at.clone()))
    }

    /// Takes it down, which nobody may use any more.
    ///
    /// # Errors
    /// When somebody does.
    pub fn remove(mut self) -> Result<()> {
        self.unmount()
    }

    fn unmount(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.is_mounted) {
            return Ok(());
        }
        run(&format!("umount {}", self.at.display())).or_else(|_| run(&format!("umount --lazy {}", self.at.display())))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(e) = self.unmount() {
            eprintln!("a file system of these tests is still there: {e:#}");
        }
    }
}

/// A file system that nobody can write to.
#[derive(Debug)]
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(e) = run(&format!("fsfreeze --unfreeze {}", self.0.display())) {
            eprintln!("a file system of these tests is still frozen: {e:#}");
        }
    }
}
