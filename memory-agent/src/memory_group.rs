//! The control group that a process's memory is accounted in.

use std::fs;
use std::io;
use std::path::Path;

/// Where cgroup 2 is mounted, alone and beside cgroup 1.
const UNIFIED: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A control group, as far as memory goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryGroup {
    version: u8,
    directory: String,
}

impl MemoryGroup {
    /// This process's; `None` where memory is not accounted at all.
    pub fn own() -> Option<Self> {
        Self::of_proc("self")
    }

    /// Another process's.
    pub fn of_process(pid: u32) -> Option<Self> {
        Self::of_proc(&pid.to_string())
    }

    fn of_proc(process: &str) -> Option<Self> {
        let text = read(Path::new(&format!("/proc/{process}/cgroup")))?;
        let mounted = |root: &&&str| Path::new(root).join("cgroup.controllers").exists();
        Self::parse(&text, UNIFIED.iter().find(mounted).unwrap_or(&UNIFIED[0]))
    }

    /// From the text of `/proc/PID/cgroup`. Memory belongs to one hierarchy only, so a version 1 line that names it
    /// goes before the version 2 line, which is there in both.
    fn parse(groups: &str, unified_at: &str) -> Option<Self> {
        let lines = groups.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            Some((parts.next()?, parts.next()?, parts.next()?.trim_end_matches('/')))
        });
        let mut unified = None;
        for (hierarchy, controllers, path) in lines {
            if controllers.split(',').any(|controller| controller == "memory") {
                return Some(Self { version: 1, directory: format!("/sys/fs/cgroup/memory{path}") });
            }
            if hierarchy == "0" && controllers.is_empty() {
                unified = Some(Self { version: 2, directory: format!("{unified_at}{path}") });
            }
        }
        unified
    }

    /// Of cgroup: 1 or 2.
    pub fn version(&self) -> u8 {
        self.version
    }

    /// The limit on its memory, in bytes; `None` when it has none.
    pub fn limit(&self) -> Option<u64> {
        let name = if self.version == 1 { "memory.limit_in_bytes" } else { "memory.max" };
        self.read(name)?.parse().ok()
    }

    /// One of its files, without blanks around it; `None` when it has none of that name that can be read.
    pub fn read(&self, name: &str) -> Option<String> {
        read(&Path::new(&self.directory).join(name))
    }

    /// Whether the kernel can be asked to reclaim from it (`memory.reclaim`: cgroup 2, Linux 5.19).
    pub fn can_reclaim(&self) -> bool {
        self.version == 2 && Path::new(&self.directory).join("memory.reclaim").exists()
    }

    /// Asks the kernel to reclaim so many bytes from it; whether it found as many. Which pages go is up to the kernel: those
    /// that wait in the swap cache first, since they were moved to the end of its lists when they had been written
    /// (mm/swap.c `folio_rotate_reclaimable`).
    ///
    /// # Errors
    /// When it is not there, or this user may not.
    pub fn reclaim(&self, bytes: u64) -> io::Result<bool> {
        // Opened, not made: a control group has the file or has not.
        let mut file = fs::OpenOptions::new().write(true).open(Path::new(&self.directory).join("memory.reclaim"))?;
        match io::Write::write_all(&mut file, bytes.to_string().as_bytes()) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }
}

fn read(path: &Path) -> Option<String> {
    // Bytes: nothing promises UTF-8.
    fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Option<(u8, String)> {
        MemoryGroup::parse(text, UNIFIED[0]).map(|group| (group.version, group.directory))
    }

    #[test]
    fn memory_is_where_it_is_accounted() {
        let hybrid = "9:name=systemd:/\n4:cpu,memory:/a:b\n0::/\n";
        assert_eq!(parsed(hybrid), Some((1, "/sys/fs/cgroup/memory/a:b".into())));
        assert_eq!(parsed("0::/"), Some((2, "/sys/fs/cgroup".into())));
        assert_eq!(parsed("3:cpu:/\n0::/user.slice/x\n"), Some((2, "/sys/fs/cgroup/user.slice/x".into())));
        assert_eq!(parsed("3:cpu:/\n4:notmemory:/\n"), None);
    }

    #[test]
    fn reclaim_is_asked_for_in_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let group = MemoryGroup { version: 2, directory: folder.path().to_str().unwrap().to_owned() };
        assert!(!group.can_reclaim() && group.reclaim(4096).is_err());
        fs::write(folder.path().join("memory.reclaim"), "").unwrap();
        assert!(group.can_reclaim() && group.reclaim(8192).unwrap());
        assert_eq!(group.read("memory.reclaim").unwrap(), "8192");
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text in "(\\PC|[:/,0\n])*") {
            let _ = MemoryGroup::parse(&text, UNIFIED[0]);
        }
    }
}
