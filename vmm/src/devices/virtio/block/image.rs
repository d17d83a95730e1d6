//! The file or block device behind a disk: opened, locked, and checked at the door.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::SECTOR;
use super::lock::{Hold, ImageLock};
use super::sys;

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
    #[error("disk {path} is in use by another process, on this host or another that shares it; end that one, or open it with readonly in both", path = .0.display())]
    Locked(PathBuf),
    /// Another process than the source uses it.
    #[error("disk {path} cannot be taken over: another process than the guest's source has locked it; give the image that the source has, or end that process", path = .0.display())]
    NotOffered(PathBuf),
    /// It has changed its size.
    #[error("disk {path} has {is} bytes by now, {was} when it was opened; give the image that the source has", path = path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size at first.
        was: u64,
        /// And now.
        is: u64,
    },
    /// What was written to it may not last.
    #[error("disk {path} does not keep what is written to it: {cause}", path = path.display())]
    Sync {
        /// The image.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
    /// It does not answer.
    #[error("disk {path} has not kept what was written to it within {limit:?}; see whether the storage behind it answers", path = path.display())]
    Hangs {
        /// The image.
        path: PathBuf,
        /// How long it had.
        limit: Duration,
    },
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
    /// Who else may have it.
    pub(super) lock: Arc<ImageLock>,
    /// Whether what was written may not last, and the guest has not been told so.
    pub(super) is_spoilt: AtomicBool,
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// For a guest that runs here.
    Ours,
    /// For a guest that runs elsewhere until it is here: whoever writes it goes on meanwhile.
    Arriving,
}

impl DiskBackend {
    /// Opens the image for a guest that runs here.
    ///
    /// # Errors
    /// As [`DiskBackend::open_for`].
    pub fn open(&self) -> Result<Image, ImageError> {
        self.open_for(Opening::Ours)
    }

    /// Opens the image, locks it, and looks at what it is. One whose guest is still elsewhere, and may write it, is locked by
    /// `Image::take`.
    ///
    /// # Errors
    /// Why it cannot be a disk.
    pub fn open_for(&self, opening: Opening) -> Result<Image, ImageError> {
        let failed = |cause: io::Error| ImageError::Open {
            path: self.path.clone(),
            hint: hint(&cause, self.readonly, opening),
            cause,
        };
        let kind = std::fs::metadata(&self.path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind(self.path.clone()));
        }
        let file = self.open_file(0).map_err(failed)?;
        let lock = ImageLock::new(&file).map_err(failed)?;
        match (opening, self.readonly) {
            (_, true) => self.hold(&lock, Hold::Reading).map_err(ImageError::Locked)?,
            (Opening::Ours, false) => self.hold(&lock, Hold::Alone).map_err(ImageError::Locked)?,
            (Opening::Arriving, false) => {}
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
        let (backend, is_spoilt) = (self.clone(), AtomicBool::new(false));
        let image = Image { file, backend, bytes, logical_block, physical_block, alignment, lock, is_spoilt };
        if opening == Opening::Arriving {
            image.drop_cache();
        }
        Ok(image)
    }

    /// Holds the image so, where there are locks; the path if somebody else does not let it.
    fn hold(&self, lock: &ImageLock, hold: Hold) -> Result<(), PathBuf> {
        match lock.hold(hold) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.path.clone()),
            // A file system that knows no locks: nobody else can have one.
            Err(e) => {
                tracing::warn!("disk {} is not locked: {e}", self.path.display());
                Ok(())
            }
        }
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

impl Image {
    /// Whoever has the image at the source has locked it, if both are the same and locks go from host to host.
    pub(super) fn look_for_source(&self) {
        if !self.backend.readonly && matches!(self.lock.is_used_elsewhere(), Ok(false)) {
            let path = self.backend.path.display();
            tracing::warn!(
                "disk {path}: nobody has locked it, as the guest's source would; make sure that it is the image that the source has"
            );
        }
    }

    /// Lets another process take it, while this one goes on as it does: what was written lasts then.
    ///
    /// # Errors
    /// When it does not by `deadline`, or the host says that it cannot; nothing is offered then.
    pub(super) fn offer(self: &Arc<Self>, deadline: Instant) -> Result<(), ImageError> {
        if self.backend.readonly {
            return Ok(());
        }
        self.sync(deadline)?;
        self.backend.hold(&self.lock, Hold::Offered).map_err(ImageError::Locked)
    }

    /// What has been written lasts.
    ///
    /// # Errors
    /// When it does not by `deadline`, or the host says that it cannot. The guest is told so at its next flush.
    pub(super) fn sync(self: &Arc<Self>, deadline: Instant) -> Result<(), ImageError> {
        let failed = |cause| ImageError::Sync { path: self.backend.path.clone(), cause };
        let limit = deadline.saturating_duration_since(Instant::now());
        // Storage that hangs keeps the thread that waits for it, and nobody else.
        let (done, waits) = channel();
        let image = Arc::clone(self);
        let sync = move || {
            let result = image.file.sync_data();
            if result.is_err() {
                image.is_spoilt.store(true, Ordering::SeqCst);
            }
            let _ = done.send(result);
        };
        crate::host::thread("image-sync").and_then(|thread| thread.spawn(sync)).map_err(failed)?;
        match waits.recv_timeout(limit) {
            Ok(result) => result.map_err(failed),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(ImageError::Hangs { path: self.backend.path.clone(), limit })
            }
        }
    }

    /// As if something that was written did not last.
    #[cfg(test)]
    pub(super) fn spoil(&self) {
        self.is_spoilt.store(true, Ordering::SeqCst);
    }

    /// Whether something that was written does not last, of which the guest has not been told; it is told now.
    pub(super) fn take_spoilt(&self) -> bool {
        self.is_spoilt.swap(false, Ordering::SeqCst)
    }

    /// Takes it from the process that offers it. Nothing is read of it that was cached here before.
    ///
    /// # Errors
    /// When somebody else has it, or it is another one.
    pub(super) fn take(&self) -> Result<(), ImageError> {
        if !self.backend.readonly {
            self.backend.hold(&self.lock, Hold::Taken).map_err(ImageError::NotOffered)?;
        }
        let path = self.backend.path.clone();
        let is = match (&self.file).seek(SeekFrom::End(0)) {
            Ok(bytes) => bytes,
            Err(cause) => return Err(ImageError::Open { path, cause, hint: "" }),
        };
        if is != self.bytes {
            return Err(ImageError::Size { path, was: self.bytes, is });
        }
        self.drop_cache();
        self.keep();
        Ok(())
    }

    /// Has it alone again: now, or as soon as a process to which it was offered has let go.
    pub(super) fn keep(&self) {
        if !self.backend.readonly {
            self.lock.hold_alone_soon();
        }
    }

    /// Has it alone again, which another process may have taken.
    ///
    /// # Errors
    /// When it has.
    pub(super) fn claim(&self) -> Result<(), ImageError> {
        let hold = if self.backend.readonly { Hold::Reading } else { Hold::Alone };
        self.backend.hold(&self.lock, hold).map_err(ImageError::Locked)
    }

    /// Has nothing to do with it any more.
    pub(super) fn let_go(&self) {
        if let Err(e) = self.lock.hold(Hold::Free) {
            tracing::debug!("disk {}: {e}", self.backend.path.display());
        }
    }

    /// Forgets what this host has in its page cache, which another may have written since (`invalidate_mapping_pages`).
    fn drop_cache(&self) {
        if let Err(e) = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed) {
            tracing::debug!("disk {}: posix_fadvise: {e}", self.backend.path.display());
        }
    }
}

fn hint(cause: &io::Error, readonly: bool, opening: Opening) -> &'static str {
    match cause.kind() {
        io::ErrorKind::NotFound if opening == Opening::Arriving => "; give the image that the guest's source has",
        io::ErrorKind::NotFound => "; make one with `truncate --size 1G FILE`",
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied if !readonly => {
            "; give readonly if reading it is enough"
        }
        io::ErrorKind::InvalidInput => "; its file system may have no direct I/O",
        _ => "",
    }
}
