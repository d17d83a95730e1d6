//! Who else moves pages in and out on this host.

use std::fs::{read_dir, read_to_string};
use std::path::{Path, PathBuf};

/// Where the kernel's monitor of memory accesses is controlled (Documentation/admin-guide/mm/damon/usage.rst).
const DAMON: &str = "/sys/kernel/mm/damon/admin/kdamonds";

/// Whether DAMON works on this host: it may page out whatever idles.
pub fn damon_is_on() -> bool {
    let states = read_dir(DAMON).into_iter().flatten().flatten().map(|monitor| monitor.path().join("state"));
    states.map(read_to_string).any(|state| state.is_ok_and(|state| state.trim() == "on"))
}

/// Swap devices that are on besides `own`. Pages go to any device, and when somebody ends theirs, the kernel brings in all
/// pages that are there, whoever's they are. Empty where the kernel does not tell.
pub fn swap_of_others(own: Option<&Path>) -> Vec<PathBuf> {
    let devices = memory_agent::active().unwrap_or_default().into_iter().map(|device| device.path);
    devices.filter(|path| Some(path.as_path()) != own).collect()
}
