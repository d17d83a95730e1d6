//! The control group that a process's memory is accounted in.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// A control group, as far as memory goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryGroup {
    version: u8,
    /// Where its hierarchy is mounted.
    mount: PathBuf,
    /// Below that.
    path: PathBuf,
}

/// How much swap a process may use by its control groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapLimit {
    /// The group that leaves least room, which may be one above the process's own.
    pub group: PathBuf,
    /// What all processes in it may use together, bytes.
    pub max: u64,
    /// What they use, bytes.
    pub used: u64,
}

impl SwapLimit {
    /// Bytes that may be used besides.
    pub fn room(&self) -> u64 {
        self.max.saturating_sub(self.used)
    }
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
        Self::parse(&read(Path::new(&format!("/proc/{process}/cgroup")))?, Path::new(ROOT))
    }

    /// From the text of `/proc/PID/cgroup`, where control groups are mounted in `root`. Memory belongs to one hierarchy only, so
    /// a version 1 line that names it goes before the version 2 line, which is there in both.
    fn parse(groups: &str, root: &Path) -> Option<Self> {
        let lines = groups.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            Some((parts.next()?, parts.next()?, parts.next()?.trim_matches('/')))
        });
        let mut unified = None;
        for (hierarchy, controllers, path) in lines {
            if controllers.split(',').any(|controller| controller == "memory") {
                return Some(Self::below(1, root.join("memory"), path));
            }
            if hierarchy == "0" && controllers.is_empty() {
                unified = Some(path);
            }
        }
        // Alone, or beside version 1.
        let mounts = [root.to_owned(), root.join("unified")];
        let mount = mounts.iter().find(|mount| mount.join("cgroup.controllers").exists()).unwrap_or(&mounts[0]);
        unified.map(|path| Self::below(2, mount.clone(), path))
    }

    /// In a container the group may be what is mounted, whatever it is called outside.
    fn below(version: u8, mount: PathBuf, path: &str) -> Self {
        let is_within = !path.split('/').any(|part| part == "..") && mount.join(path).exists();
        Self { version, path: if is_within { path.into() } else { PathBuf::new() }, mount }
    }

    /// The group, and those above it, of which each limits what is in it.
    fn levels(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.path.ancestors().map(|path| if path == Path::new("") { self.mount.clone() } else { self.mount.join(path) })
    }

    /// Of cgroup: 1 or 2.
    pub fn version(&self) -> u8 {
        self.version
    }

    /// Its folder.
    pub fn directory(&self) -> PathBuf {
        self.mount.join(&self.path)
    }

    /// The limit on its memory, in bytes, by itself or a group above it; `None` when it has none.
    pub fn limit(&self) -> Option<u64> {
        let name = if self.version == 1 { "memory.limit_in_bytes" } else { "memory.max" };
        self.levels().filter_map(|level| read(&level.join(name))?.parse().ok()).min()
    }

    /// The limit on swap that leaves least room; `None` when there is none. Version 1 limits memory and swap together
    /// (`memory.memsw.limit_in_bytes`), which a page that is paged out does not change, and its `memory.swappiness` is
    /// for the kernel's own choice alone: neither keeps pages from being paged out.
    pub fn swap_limit(&self) -> Option<SwapLimit> {
        if self.version == 1 {
            return None;
        }
        let limits = self.levels().filter_map(|group| {
            let bytes = |name: &str| read(&group.join(name))?.parse::<u64>().ok();
            // "max" is no number, and no limit.
            let (max, used) = (bytes("memory.swap.max")?, bytes("memory.swap.current").unwrap_or(0));
            Some(SwapLimit { group, max, used })
        });
        limits.min_by_key(SwapLimit::room)
    }

    /// One of its files, without blanks around it; `None` when it has none of that name that can be read.
    pub fn read(&self, name: &str) -> Option<String> {
        read(&self.directory().join(name))
    }

    /// Whether the kernel can be asked to reclaim from it (`memory.reclaim`: cgroup 2, Linux 5.19).
    pub fn can_reclaim(&self) -> bool {
        self.version == 2 && self.directory().join("memory.reclaim").exists()
    }

    /// Asks the kernel to reclaim so many bytes from it; whether it found as many. Which pages go is up to the kernel: those
    /// that wait in the swap cache first, since they were moved to the end of its lists when they had been written
    /// (mm/swap.c `folio_rotate_reclaimable`).
    ///
    /// # Errors
    /// When it is not there, or this user may not.
    pub fn reclaim(&self, bytes: u64) -> io::Result<bool> {
        // Opened, not made: a control group has the file or has not.
        let mut file = fs::OpenOptions::new().write(true).open(self.directory().join("memory.reclaim"))?;
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

    /// Control groups made of plain folders and files.
    fn made(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn memory_is_where_it_is_accounted() {
        let root = made(&[("memory/a:b/x", ""), ("unified/cgroup.controllers", ""), ("unified/user/x", "")]);
        let parsed = |text: &str| {
            MemoryGroup::parse(text, root.path()).map(|group| {
                let directory = group.directory().strip_prefix(root.path()).unwrap().to_owned();
                (group.version, directory.to_str().unwrap().trim_end_matches('/').to_owned())
            })
        };
        assert_eq!(parsed("9:name=systemd:/\n4:cpu,memory:/a:b\n0::/\n"), Some((1, "memory/a:b".into())));
        assert_eq!(parsed("0::/"), Some((2, "unified".into())));
        assert_eq!(parsed("3:cpu:/\n0::/user\n"), Some((2, "unified/user".into())));
        assert_eq!(parsed("3:cpu:/\n4:notmemory:/\n"), None);
        // What a container calls by a name that only its host knows, or that is outside, is what is mounted.
        assert_eq!(parsed("4:memory:/docker/1234\n"), Some((1, "memory".into())));
        assert_eq!(parsed("0::/../user\n"), Some((2, "unified".into())));
    }

    #[test]
    fn every_group_up_to_the_root_limits() {
        let root = made(&[
            ("cgroup.controllers", "memory"),
            ("pods/memory.swap.max", "0\n"),
            ("pods/memory.swap.current", "0\n"),
            ("pods/memory.max", "1048576\n"),
            ("pods/one/memory.swap.max", "max\n"),
            ("pods/one/memory.swap.current", "0\n"),
            ("pods/one/memory.max", "max\n"),
            ("user/memory.swap.max", "8192\n"),
            ("user/memory.swap.current", "8192\n"),
            ("user/shell/memory.swap.max", "4096\n"),
            ("user/shell/memory.swap.current", "0\n"),
            ("free/memory.swap.max", "max\n"),
        ]);
        let of = |path: &str| MemoryGroup::parse(&format!("0::{path}"), root.path()).unwrap();
        let limit = |group: &str, max, used| Some(SwapLimit { group: root.path().join(group), max, used });
        assert_eq!(of("/pods/one").swap_limit(), limit("pods", 0, 0));
        assert_eq!(of("/pods/one").limit(), Some(1 << 20));
        assert_eq!(of("/user/shell").swap_limit(), limit("user", 8192, 8192));
        assert_eq!(of("/free").swap_limit(), None);
        assert_eq!(of("/free").limit(), None);
    }

    #[test]
    fn reclaim_is_asked_for_in_bytes() {
        let root = made(&[("cgroup.controllers", "memory")]);
        let group = MemoryGroup::parse("0::/", root.path()).unwrap();
        assert!(!group.can_reclaim() && group.reclaim(4096).is_err());
        fs::write(root.path().join("memory.reclaim"), "").unwrap();
        assert!(group.can_reclaim() && group.reclaim(8192).unwrap());
        assert_eq!(group.read("memory.reclaim").unwrap(), "8192");
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text in "(\\PC|[:/,0\n])*") {
            let _ = MemoryGroup::parse(&text, Path::new(ROOT));
        }
    }
}
