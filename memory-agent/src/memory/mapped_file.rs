//! The file of another process's mapping.

use std::fs::{OpenOptions, read_dir};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, fstat, fstatfs, major, open};
use rustix::io::Errno;

use super::mapping::TMPFS_MAGIC;
use super::maps::{FileId, SharedFileMapping};
use super::{FileView, Process, TargetError, io_error};

/// File system type of huge pages (include/uapi/linux/magic.h `HUGETLBFS_MAGIC`).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What memory files without a path are called, and the folder of those that programs share.
const NAMES: [&str; 5] = ["/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage"];

impl Process {
    /// The file of a mapping, opened; `None` when it is no memory, but a file on a disk or a device.
    ///
    /// Nothing is opened for reading or writing before it has been seen to be that file, and memory.
    pub(super) fn view_of(&self, mapping: &SharedFileMapping) -> Result<Option<Arc<FileView>>, TargetError> {
        let handle = self.handle_of(mapping);
        // Still there, so what was found by number was this process's.
        if self.has_ended() {
            return Err(TargetError::Exited(self.pid()));
        }
        match handle {
            Ok(handle) => open_memory(&handle, mapping),
            Err(why) if may_be_memory(mapping) => Err(why),
            Err(_) => Ok(None),
        }
    }

    /// The file by the mapping itself, or, where this is not permitted (fs/proc/base.c `proc_map_files_get_link`), by a
    /// descriptor of the process, or by its path.
    fn handle_of(&self, mapping: &SharedFileMapping) -> Result<OwnedFd, TargetError> {
        let is_it = |path: &Path| handle(path).ok().filter(|handle| is_file(handle, mapping.file));
        let why = match self.map_file(mapping).map(|path| (handle(&path), path)) {
            Ok((Ok(handle), _)) if is_file(&handle, mapping.file) => return Ok(handle),
            Ok((Err(Errno::PERM), _)) => {
                TargetError::NoRight { what: "open the mapped files", pid: self.pid(), capability: "CAP_SYS_ADMIN" }
            }
            Ok((Err(e), path)) => self.refused("open the mapped files", &path.to_string_lossy(), e.into()),
            // Something else is mapped there by now.
            Ok((Ok(_), _)) => self.not_found(mapping),
            Err(why) => why,
        };
        let descriptors =
            read_dir(format!("/proc/{}/fd", self.pid())).map_err(|e| self.refused("list the files", "fd", e));
        let mut descriptors = descriptors?.flatten().map(|entry| entry.path());
        descriptors.find_map(|path| is_it(&path)).or_else(|| is_it(Path::new(&mapping.name))).ok_or(why)
    }

    /// Where `/proc` has the file of a mapping, or of its first part: neighbours may have been joined.
    fn map_file(&self, mapping: &SharedFileMapping) -> Result<PathBuf, TargetError> {
        let folder = format!("/proc/{}/map_files", self.pid());
        let entries = read_dir(folder).map_err(|e| self.refused("list the mapped files", "map_files", e))?;
        let start = format!("{:x}-", mapping.addresses.start);
        let entry = entries.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(&start));
        entry.map(|entry| entry.path()).ok_or_else(|| self.not_found(mapping))
    }

    fn not_found(&self, mapping: &SharedFileMapping) -> TargetError {
        TargetError::NotFound { pid: self.pid(), name: mapping.name.clone() }
    }
}

/// A file that is not opened: nothing happens to it, and no right to read it is needed.
fn handle(path: &Path) -> rustix::io::Result<OwnedFd> {
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

fn is_file(handle: &OwnedFd, file: FileId) -> bool {
    fstat(handle).is_ok_and(|stat| FileId::of(&stat) == file)
}

/// Opens a file that is memory.
fn open_memory(handle: &OwnedFd, mapping: &SharedFileMapping) -> Result<Option<Arc<FileView>>, TargetError> {
    let examine = |e: Errno| io_error("examine", &mapping.name)(e.into());
    if FileType::from_raw_mode(fstat(handle).map_err(examine)?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    match fstatfs(handle).map_err(examine)?.f_type {
        TMPFS_MAGIC => {}
        HUGETLBFS_MAGIC => return Err(TargetError::NotSharedMemory),
        _ => return Ok(None),
    }
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(io_error("open", &mapping.name))?;
    FileView::whole(file, Path::new(&mapping.name)).map(|view| Some(Arc::new(view)))
}

/// Whether a mapping whose file cannot be looked at may be of memory: by its name, or because it is written and its file
/// system is on no block device.
fn may_be_memory(mapping: &SharedFileMapping) -> bool {
    let is_path = mapping.name.starts_with('/');
    let named = NAMES.iter().any(|name| mapping.name.starts_with(name));
    named || is_path && mapping.writable && major(mapping.file.device) == 0
}

#[cfg(test)]
mod tests {
    use super::super::maps::shared_mappings;
    use super::*;

    #[test]
    fn what_cannot_be_looked_at_is_told_by_its_name() {
        let may_be = |line: &str| may_be_memory(&shared_mappings(line)[0]);
        assert!(may_be("1000-2000 r--s 00000000 00:01 9 /memfd:ram (deleted)"));
        assert!(may_be("1000-2000 rw-s 00000000 00:2a 9 /mnt/hugepages/ram"));
        assert!(!may_be("1000-2000 r--s 00000000 00:2a 9 /overlay/locale-archive"));
        assert!(!may_be("1000-2000 rw-s 00000000 08:01 9 /var/lib/database"));
        assert!(!may_be("1000-2000 rw-s 00000000 00:0e 9 anon_inode:kvm-vcpu:0"));
    }
}
