//! Another process.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::maps::{SharedFileMapping, shared_mappings};
use super::{FileView, ProcessMemory, TargetError, io_error};

/// How long a process may take to end after it has let go of its memory, which may be much.
const ENDING: Duration = Duration::from_secs(2);

/// A running process. Whatever is asked of it is asked of that very process, also when its number is given to another.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    /// Its folder in `/proc`.
    folder: OwnedFd,
}

impl Process {
    /// The process with this number.
    ///
    /// # Errors
    /// [`TargetError::NoProcess`] when there is none.
    pub fn open(pid: u32) -> Result<Arc<Self>, TargetError> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(TargetError::NoProcess(pid))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|e| match e {
            Errno::SRCH => TargetError::NoProcess(pid),
            Errno::NOSYS | Errno::PERM => TargetError::NoCall { call: "pidfd_open", since: "5.3" },
            e => io_error("open", format!("process {pid}"))(e.into()),
        })?;
        let path = format!("/proc/{pid}");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(&path, flags, Mode::empty()).map_err(|e| io_error("open", &path)(e.into()))?;
        let process = Self { pid, pidfd, folder };
        // Still there, so the folder is not that of a later process of the same number.
        if process.has_ended() { Err(TargetError::Exited(pid)) } else { Ok(Arc::new(process)) }
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.ends_within(Duration::ZERO)
    }

    /// Waits for its end, at most so long.
    fn ends_within(&self, time: Duration) -> bool {
        let mut ends = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let time = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: i64::from(time.subsec_nanos()) };
        poll(&mut ends, Some(&time)).is_ok_and(|ended| ended > 0)
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// A file in its folder.
    pub(super) fn file(&self, name: &str, what: &'static str) -> Result<File, TargetError> {
        let opened = openat(&self.folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        opened.map(File::from).map_err(|e| self.refused(what, name, e.into()))
    }

    fn refused(&self, what: &'static str, name: &str, error: io::Error) -> TargetError {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::SRCH) => TargetError::Exited(self.pid),
            _ if self.has_ended() => TargetError::Exited(self.pid),
            Some(Errno::ACCESS | Errno::PERM) => {
                TargetError::NoRight { what, pid: self.pid, capability: "CAP_SYS_PTRACE" }
            }
            _ => io_error("open", format!("/proc/{}/{name}", self.pid))(error),
        }
    }

    /// The file mappings that it shares, as they are now.
    pub(super) fn shared_mappings(&self) -> Result<Vec<SharedFileMapping>, TargetError> {
        let what = "read the mappings";
        let mut text = String::new();
        let read = self.file("maps", what)?.read_to_string(&mut text);
        read.map_err(|e| self.refused(what, "maps", e))?;
        // A process without any mapping is about to end, or to execute another program.
        let patience = if text.is_empty() { ENDING } else { Duration::ZERO };
        if self.ends_within(patience) { Err(TargetError::Exited(self.pid)) } else { Ok(shared_mappings(&text)) }
    }

    /// The shared memory that it maps, in files whose name contains `name`; the largest first. A file that is mapped in
    /// several pieces gives several, one that is mapped more than once is taken where it can be written.
    ///
    /// # Errors
    /// [`TargetError::NotFound`] when there is none; others when it cannot be looked at.
    pub fn shared_memory(self: &Arc<Self>, name: &str) -> Result<Vec<ProcessMemory>, TargetError> {
        let mut mappings = self.shared_mappings()?;
        mappings.retain(|mapping| mapping.name.contains(name));
        // A mapping that writes is the one that the process works with.
        mappings.sort_by_key(|m| (!m.writable, std::cmp::Reverse(m.addresses.end - m.addresses.start)));
        let mut memories: Vec<ProcessMemory> = Vec::new();
        let mut refused = None;
        for mapping in mappings {
            let covered = |memory: &ProcessMemory| memory.covers(&mapping);
            if memories.iter().any(covered) {
                continue;
            }
            let same_file = memories.iter().find(|memory| memory.is_of(&mapping));
            let view = match same_file.map(|memory| Ok(memory.file())).unwrap_or_else(|| self.view_of(&mapping)) {
                Ok(view) => view,
                Err(e) => {
                    refused.get_or_insert(e);
                    continue;
                }
            };
            memories.push(ProcessMemory::new(Arc::clone(self), view, mapping)?);
        }
        match (memories.is_empty(), refused) {
            (false, _) => Ok(memories),
            (true, Some(why @ (TargetError::NoRight { .. } | TargetError::Exited(_)))) => Err(why),
            (true, Some(why)) if !name.is_empty() => Err(why),
            (true, _) => Err(TargetError::NotFound { pid: self.pid, name: name.to_owned() }),
        }
    }

    /// The file of a mapping, opened by that mapping, or by a descriptor of the process where this is not permitted
    /// (fs/proc/base.c `proc_map_files_get_link`).
    fn view_of(&self, mapping: &SharedFileMapping) -> Result<Arc<FileView>, TargetError> {
        use std::os::unix::fs::MetadataExt;
        let pid = self.pid;
        let by_mapping = self.map_file(mapping).map_or_else(Err, FileView::open);
        let view = by_mapping.or_else(|why| {
            let folder = format!("/proc/{pid}/fd");
            let entries = std::fs::read_dir(&folder).map_err(|e| self.refused("list the files", "fd", e))?;
            let has_inode = |path: &Path| path.metadata().is_ok_and(|m| m.is_file() && m.ino() == mapping.file.1);
            let path = entries.flatten().map(|entry| entry.path()).find(|path| has_inode(path)).ok_or(why)?;
            FileView::open(path)
        })?;
        // Still there, so what was opened by number was this process's.
        if self.has_ended() { Err(TargetError::Exited(pid)) } else { Ok(Arc::new(view)) }
    }

    /// Where `/proc` has the file of a mapping, or of its first part: neighbours may have been joined.
    fn map_file(&self, mapping: &SharedFileMapping) -> Result<std::path::PathBuf, TargetError> {
        let folder = format!("/proc/{}/map_files", self.pid);
        let entries = std::fs::read_dir(&folder).map_err(|e| self.refused("list the mapped files", "map_files", e))?;
        let start = format!("{:x}-", mapping.addresses.start);
        let entry = entries.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(&start));
        entry
            .map(|entry| entry.path())
            .ok_or_else(|| TargetError::NotFound { pid: self.pid, name: mapping.name.clone() })
    }
}
