//! The file or block device behind a disk: opened, locked, and checked at the door.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use super::SECTOR;
use super::sys::{self, Lock};

/// First bytes of a qcow2 image (QEMU, docs/interop/qcow2.rst).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// What a disk is on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskBackend {
    /// A file or a block device.
    pub path: PathBuf,
    /// Whether it is opened for reading alone.
    pub readonly: bool,
    /// Whether it is read and written past this host's page cache.
    pub direct: bool,
    /// Whether it is a raw image whatever it begins with, which is the guest's to write.
    pub is_raw: bool,
}

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("disk {path}: {cause}{hint}", path = path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
        /// What can be done, if it is known.
        hint: &'static str,
    },
    /// It is neither a file nor a block device.
    #[error("disk {path} is neither a file nor a block device", path = .0.display())]
    Kind(PathBuf),
    /// Another process uses it.
    #[error("disk {path} is in use by another process; end that one, or open it with readonly in both", path = .0.display())]
    Locked(PathBuf),
    /// It is no whole number of sectors.
    #[error("disk {path} has {bytes} bytes, which is not a whole number of {SECTOR}-byte sectors; make it one with `truncate --size %{SECTOR} FILE`", path = path.display())]
    PartialSector {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It is empty.
    #[error("disk {path} is empty; give it a size with `truncate --size 1G FILE`", path = .0.display())]
    Empty(PathBuf),
    /// It is in a format of its own.
    #[error("disk {path} is a qcow2 image; make a raw one of it with `qemu-img convert -O raw {path} FILE`; if it is a raw image into which a guest has written such a header, give format=raw", path = .0.display())]
    Qcow2(PathBuf),
}

/// An image that is open, and nobody else's as long as it is.
#[derive(Debug)]
pub struct Image {
    /// Its file.
    pub file: File,
    /// Whose path this is.
    pub backend: DiskBackend,
    /// Size in bytes, a multiple of [`SECTOR`].
    pub bytes: u64,
    /// What it is addressed in, bytes.
    pub logical_block: u32,
    /// What it is written in at once, bytes.
    pub physical_block: u32,
    /// What memory, offset and length must be aligned to, bytes; 1 without direct I/O.
    pub alignment: u32,
}

impl DiskBackend {
    /// Opens the image, locks it, and looks at what it is.
    ///
    /// # Errors
    /// Why it cannot be a disk.
    pub fn open(&self) -> Result<Image, ImageError> {
        let failed =
            |cause: io::Error| ImageError::Open { path: self.path.clone(), hint: hint(&cause, self.readonly), cause };
        let kind = std::fs::metadata(&self.path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind(self.path.clone()));
        }
        let file = self.open_file(0).map_err(failed)?;
        let lock = if self.readonly { Lock::Shared } else { Lock::Exclusive };
        match sys::lock(&file, lock) {
            Ok(true) => {}
            Ok(false) => return Err(ImageError::Locked(self.path.clone())),
            // A file system that knows no locks: nobody else can have one.
            Err(e) => tracing::warn!("disk {} is not locked: {e}", self.path.display()),
        }
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
        (&file).rewind().map_err(failed)?;
        self.check(&file, bytes).map_err(|e| e.unwrap_or_else(failed))?;
        let (mut logical_block, physical_block) = if kind.is_block_device() {
            let physical = rustix::fs::ioctl_blkpbszget(&file).map_err(|e| failed(e.into()))?;
            (rustix::fs::ioctl_blksszget(&file).map_err(|e| failed(e.into()))?, physical)
        } else {
            (SECTOR as u32, 4096)
        };
        let (file, alignment) = if self.direct { self.direct(&file).map_err(failed)? } else { (file, 1) };
        logical_block = logical_block.max(if self.direct { alignment } else { 1 });
        let backend = self.clone();
        Ok(Image { file, backend, bytes, logical_block, physical_block, alignment })
    }

    /// Whether both are one image, as far as can be told: by one path or another.
    pub fn is_same_image(&self, other: &Self) -> bool {
        let identity = |backend: &Self| {
            let file = backend.path.metadata().ok()?;
            // Block devices have many files.
            Some(if file.rdev() == 0 { (file.dev(), file.ino(), 0) } else { (0, 0, file.rdev()) })
        };
        self.path == other.path || identity(self).is_some_and(|image| identity(other) == Some(image))
    }

    /// Why what was opened is no disk: something of its own, or what the host said.
    fn check(&self, file: &File, bytes: u64) -> Result<(), Result<ImageError, io::Error>> {
        let path = || self.path.clone();
        if bytes == 0 {
            return Err(Ok(ImageError::Empty(path())));
        }
        let mut magic = Vec::new();
        file.take(QCOW2_MAGIC.len() as u64).read_to_end(&mut magic).map_err(Err)?;
        if magic == QCOW2_MAGIC && !self.is_raw {
            return Err(Ok(ImageError::Qcow2(path())));
        }
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Ok(ImageError::PartialSector { path: path(), bytes }));
        }
        Ok(())
    }

    fn open_file(&self, flags: i32) -> io::Result<File> {
        OpenOptions::new().read(true).write(!self.readonly).custom_flags(flags).open(&self.path)
    }

    /// The same open file, past the page cache, and what that has to be aligned to. The lock stays.
    fn direct(&self, file: &File) -> io::Result<(File, u32)> {
        let flags = rustix::fs::fcntl_getfl(file)? | rustix::fs::OFlags::DIRECT;
        rustix::fs::fcntl_setfl(file, flags)?;
        let file = file.try_clone()?;
        for alignment in [SECTOR as usize, 4096] {
            let mut buffer = sys::Aligned::new(alignment, alignment);
            if sys::read_at(&file, buffer.bytes(), alignment as u64).is_ok() {
                return Ok((file, alignment as u32));
            }
        }
        Err(io::Error::other("it cannot be read with direct I/O"))
    }
}

fn hint(cause: &io::Error, readonly: bool) -> &'static str {
    match cause.kind() {
        io::ErrorKind::NotFound => "; make one with `truncate --size 1G FILE`",
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied if !readonly => {
            "; give readonly if reading it is enough"
        }
        io::ErrorKind::InvalidInput => "; its file system may have no direct I/O",
        _ => "",
    }
}
