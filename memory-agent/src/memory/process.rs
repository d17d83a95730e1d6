//! Another process.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::maps::{SharedFileMapping, shared_mappings};
use super::{ProcessMemory, TargetError, io_error};

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

    pub(super) fn refused(&self, what: &'static str, name: &str, error: io::Error) -> TargetError {
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
        // A process without any mapping is about to end, or to execute another program. One that got there while it was
        // read has given only the first of its mappings (m_start in fs/proc/task_mmu.c).
        let patience = if self.has_mappings()? { Duration::ZERO } else { ENDING };
        if self.ends_within(patience) { Err(TargetError::Exited(self.pid)) } else { Ok(shared_mappings(&text)) }
    }

    fn has_mappings(&self) -> Result<bool, TargetError> {
        let what = "read the mappings";
        let read = self.file("maps", what)?.read(&mut [0; 1]);
        read.map(|bytes| bytes > 0).map_err(|e| self.refused(what, "maps", e))
    }

    /// The shared memory that it maps, in files whose name contains `name`; the largest first. A file that is mapped in
    /// several pieces gives several, one that is mapped more than once is taken where it can be written.
    ///
    /// # Errors
    /// [`TargetError::NotFound`] when there is none; why it is left out, when all there is is left out; others when the
    /// process cannot be looked at.
    pub fn shared_memory(self: &Arc<Self>, name: &str) -> Result<SharedMemory, TargetError> {
        let mut mappings = self.shared_mappings()?;
        mappings.retain(|mapping| mapping.name.contains(name));
        // A mapping that writes is the one that the process works with.
        mappings.sort_by_key(|m| (!m.writable, std::cmp::Reverse(m.length())));
        let mut found = SharedMemory::default();
        for mapping in mappings {
            let covered = |memory: &ProcessMemory| memory.covers(&mapping);
            if found.memories.iter().any(covered) {
                continue;
            }
            match self.memory_of(&mapping, &found.memories) {
                Ok(Some(memory)) => found.memories.push(memory),
                Ok(None) => {}
                Err(why @ TargetError::Exited(_)) => return Err(why),
                Err(why) => {
                    let (name, address, bytes) = (mapping.name.clone(), mapping.addresses.start, mapping.length());
                    found.left_out.push(LeftOut { name, address, bytes, why });
                }
            }
        }
        match (found.memories.is_empty(), found.left_out.is_empty()) {
            (false, _) => Ok(found),
            (true, false) => Err(found.left_out.swap_remove(0).why),
            (true, true) => Err(TargetError::NotFound { pid: self.pid, name: name.to_owned() }),
        }
    }

    /// The memory that a mapping is, where it is any; `others` have their files open.
    fn memory_of(
        self: &Arc<Self>,
        mapping: &SharedFileMapping,
        others: &[ProcessMemory],
    ) -> Result<Option<ProcessMemory>, TargetError> {
        let view = match others.iter().find(|memory| memory.is_of(mapping)) {
            Some(memory) => Some(memory.file()),
            None => self.view_of(mapping)?,
        };
        view.map(|view| ProcessMemory::new(Arc::clone(self), view, mapping.clone())).transpose()
    }
}

/// What [`Process::shared_memory`] has found.
#[derive(Debug, Default)]
pub struct SharedMemory {
    /// Memory that can be worked with, the largest piece first.
    pub memories: Vec<ProcessMemory>,
    /// Memory that cannot.
    pub left_out: Vec<LeftOut>,
}

/// A shared mapping of a memory file that cannot be worked with.
#[derive(Debug)]
pub struct LeftOut {
    /// The file's name.
    pub name: String,
    /// Where the process has its first byte.
    pub address: u64,
    /// How much of it is mapped.
    pub bytes: u64,
    /// Why not.
    pub why: TargetError,
}
