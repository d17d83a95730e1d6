//! Where bytes that are loaded come from: a file that stays open, so that it is the same one when the guest reboots, or this
//! program itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use super::BootError;

/// Bytes of known length that can be read anywhere, again and again.
#[derive(Debug)]
pub(super) enum Source {
    /// In this program.
    Embedded(&'static [u8]),
    /// A regular file.
    File {
        /// As it was given.
        path: PathBuf,
        /// Open for reading.
        file: File,
        /// Bytes, when it was opened.
        length: u64,
    },
}

impl Source {
    /// Opens a regular file; `what` it is to be is for the error.
    pub(super) fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let failed = |cause| BootError::Open { what, path: path.into(), cause };
        // Looked at first: opening a named pipe would wait for somebody to write into it.
        let metadata = path.metadata().map_err(failed)?;
        if !metadata.is_file() {
            let kind = metadata.file_type();
            let kind = match () {
                () if kind.is_dir() => "a folder",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_socket() => "a socket",
                () => "a device",
            };
            return Err(BootError::NotRegular { what, path: path.into(), kind });
        }
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok(Self::File { path: path.into(), file, length })
    }

    /// Number of bytes.
    pub(super) fn length(&self) -> u64 {
        match self {
            Self::Embedded(bytes) => bytes.len() as u64,
            Self::File { length, .. } => *length,
        }
    }

    /// For people.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::Embedded(_) => "workload".into(),
            Self::File { path, .. } => path.clone(),
        }
    }

    /// Fills `buffer` from `offset` on.
    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Embedded(bytes) => {
                let from =
                    usize::try_from(offset).ok().and_then(|start| bytes.get(start..start.checked_add(buffer.len())?));
                buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Self::File { file, .. } => file.read_exact_at(buffer, offset),
        }
    }

    /// Up to `most` bytes from `offset` on; fewer where it ends.
    pub(super) fn read_up_to(&self, offset: u64, most: usize) -> io::Result<Vec<u8>> {
        let rest = usize::try_from(self.length().saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; most.min(rest)];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        self.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}
