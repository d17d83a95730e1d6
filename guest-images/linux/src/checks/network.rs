//! The guest's network interface.

use std::path::Path;
use std::process::Command;

use linux_guest::ADDRESS_PARAMETER;

use super::{text_of, tried, wait_for};

const BUSYBOX: &str = "/bin/busybox";
const INTERFACE: &str = "eth0";

/// Waits for the interface, sees to its having its address, and gives its folder in sysfs.
pub(super) fn set_up() -> Result<String, String> {
    let folder = format!("/sys/class/net/{INTERFACE}");
    wait_for(INTERFACE, || Path::new(&folder).exists().then_some(()))?;
    let parameters = text_of("/proc/cmdline")?;
    let own = parameters.split_whitespace().find_map(|word| word.strip_prefix(ADDRESS_PARAMETER));
    let own = own.ok_or(format!("the kernel's command line has no {ADDRESS_PARAMETER}"))?;
    if !text_of(&format!("{folder}/operstate"))?.contains("up") {
        busybox(&["ip", "link", "set", INTERFACE, "up"])?;
    }
    // It may have it already.
    let _ = busybox(&["ip", "address", "add", own, "dev", INTERFACE]);
    Ok(folder)
}

/// Runs a program of busybox's; its words when it fails.
pub(super) fn busybox(words: &[&str]) -> Result<(), String> {
    let output = Command::new(BUSYBOX).args(words).output().map_err(tried(BUSYBOX))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(format!("{}: {}", words.join(" "), String::from_utf8_lossy(&said).trim()))
}
