//! Memory: much of it is written, and given back to the kernel, which may tell the host that it is free.

use std::time::Duration;

use super::text_of;
use crate::{Outcome, news};

const PAGE_BYTES: usize = 4096;

/// The argument is how much, MiB, and how long to keep it, seconds: `256` or `256+3`.
pub(super) fn check(argument: &str) -> Outcome {
    let (mib, seconds) = argument.split_once('+').unwrap_or((argument, "0"));
    let mib: usize = mib.parse().map_err(|_| format!("{argument} is no number of MiB"))?;
    let seconds = seconds.parse().map_err(|_| format!("{argument} has no number of seconds"))?;
    let total = text_of("/proc/meminfo")?;
    let total = total.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    let total = total.trim().trim_end_matches(" kB").to_owned();
    let mut memory = vec![0_u8; mib << 20];
    for (index, page) in memory.chunks_mut(PAGE_BYTES).enumerate() {
        page[..8].copy_from_slice(&index.to_le_bytes());
    }
    news("memory", &format!("filled mib={mib}"));
    std::thread::sleep(Duration::from_secs(seconds));
    for (index, page) in memory.chunks(PAGE_BYTES).enumerate() {
        if page[..8] != index.to_le_bytes() {
            return Err(format!("page {index} of {mib} MiB has lost what was written"));
        }
    }
    drop(memory);
    Ok(format!("mib={mib} total_kib={total}"))
}
