//! What the host has, as far as the monitor must know it to say no in time.

pub(crate) mod adaptive_poll;
pub(crate) mod text;
mod thread;

pub(crate) use thread::thread;

use memory_agent::{ByteSize, MemoryGroup};

/// Memory and swap together, within the limit of this process's control group; `None` when the host does not say.
pub fn memory_and_swap() -> Option<ByteSize> {
    let meminfo = text::read("/proc/meminfo")?;
    let memory = text::kib_field(&meminfo, "MemTotal")?;
    let swap = text::kib_field(&meminfo, "SwapTotal").unwrap_or(0);
    let memory = MemoryGroup::own().and_then(|group| group.limit()).map_or(memory, |limit| limit.min(memory));
    Some(ByteSize(memory.saturating_add(swap)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_memory() {
        assert!(memory_and_swap().is_some_and(|size| size > ByteSize::mib(64)));
    }
}
