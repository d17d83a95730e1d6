//! The control group this process is in, as far as memory goes.

use super::text;

/// Where this process's memory is accounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryGroup {
    /// 1 or 2.
    pub(crate) version: u8,
    /// Its directory.
    directory: String,
}

impl MemoryGroup {
    /// This process's; `None` where memory is not accounted at all.
    pub(crate) fn own() -> Option<Self> {
        Self::parse(&text::read("/proc/self/cgroup")?)
    }

    /// From the text of `/proc/self/cgroup`. Memory belongs to one hierarchy only, so a version 1 line that names it
    /// goes before the version 2 line, which is there in both.
    fn parse(groups: &str) -> Option<Self> {
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
                unified = Some(Self { version: 2, directory: format!("/sys/fs/cgroup{path}") });
            }
        }
        unified
    }

    /// The limit on its memory, in bytes; `None` when it has none.
    pub(crate) fn limit(&self) -> Option<u64> {
        let name = if self.version == 1 { "memory.limit_in_bytes" } else { "memory.max" };
        self.read(name)?.parse().ok()
    }

    /// One of its files; `None` when it has none of that name that can be read.
    pub(crate) fn read(&self, name: &str) -> Option<String> {
        text::read(&format!("{}/{name}", self.directory))
    }

    /// Path of one of its files.
    pub(crate) fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.directory)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Option<(u8, String)> {
        MemoryGroup::parse(text).map(|group| (group.version, group.directory))
    }

    #[test]
    fn memory_is_where_it_is_accounted() {
        let hybrid = "9:name=systemd:/\n4:cpu,memory:/a:b\n0::/\n";
        assert_eq!(parsed(hybrid), Some((1, "/sys/fs/cgroup/memory/a:b".into())));
        assert_eq!(parsed("0::/"), Some((2, "/sys/fs/cgroup".into())));
        assert_eq!(parsed("3:cpu:/\n0::/user.slice/x\n"), Some((2, "/sys/fs/cgroup/user.slice/x".into())));
        assert_eq!(parsed("3:cpu:/\n4:notmemory:/\n"), None);
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text in "(\\PC|[:/,0\n])*") {
            let _ = MemoryGroup::parse(&text);
        }
    }
}
