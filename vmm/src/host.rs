//! What the host has, as far as the monitor must know it to say no in time.

use std::fs;

use crate::units::ByteSize;

/// Memory and swap together, within the limits of this process's control group; `None` when the host does not say.
pub fn memory_and_swap() -> Option<ByteSize> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let memory = meminfo_kib(&meminfo, "MemTotal")?.saturating_mul(1024);
    let swap = meminfo_kib(&meminfo, "SwapTotal").unwrap_or(0).saturating_mul(1024);
    let memory = cgroup_limit().map_or(memory, |limit| limit.min(memory));
    Some(ByteSize(memory.saturating_add(swap)))
}

/// A value of `/proc/meminfo`, in KiB.
fn meminfo_kib(meminfo: &str, name: &str) -> Option<u64> {
    meminfo.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?.strip_prefix(':')?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

/// The limit on memory of this process's control group, of either version, in bytes.
pub fn cgroup_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let files = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let path = path.trim_end_matches('/');
        if controllers.is_empty() {
            Some(format!("/sys/fs/cgroup{path}/memory.max"))
        } else {
            let memory = controllers.split(',').any(|c| c == "memory");
            memory.then(|| format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"))
        }
    });
    files.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_by_name() {
        let text = "MemTotal:       24637580 kB\nMemFree: 12 kB\nSwapTotal:             0 kB\n";
        assert_eq!(meminfo_kib(text, "MemTotal"), Some(24_637_580));
        assert_eq!(meminfo_kib(text, "SwapTotal"), Some(0));
        assert_eq!(meminfo_kib(text, "Swap"), None);
    }

    #[test]
    fn this_host_has_memory() {
        assert!(memory_and_swap().unwrap() > ByteSize::mib(64));
    }
}
