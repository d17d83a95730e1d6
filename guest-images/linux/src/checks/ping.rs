//! The network: the host answers, to small packets and to large ones.

use std::path::Path;
use std::process::Command;

use linux_guest::ADDRESS_PARAMETER;

use super::{text_of, tried, wait_for};
use crate::Outcome;

const BUSYBOX: &str = "/bin/busybox";
const INTERFACE: &str = "eth0";
/// What is sent besides the headers, bytes: small; what fits in a frame; and what does not.
const SIZES: [&str; 3] = ["56", "1400", "8000"];

/// The argument is the host's address.
pub(super) fn check(host: &str) -> Outcome {
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
    for size in SIZES {
        busybox(&["ping", "-q", "-c", "3", "-i", "0.2", "-W", "5", "-s", size, host])?;
    }
    let attribute = |file: &str| text_of(&format!("{folder}/{file}"));
    let queues = std::fs::read_dir(format!("{folder}/queues")).map_err(tried("queues"))?.count();
    Ok(format!("mac={} mtu={} queues={queues}", attribute("address")?, attribute("mtu")?))
}

/// Runs a program of busybox's; its words when it fails.
fn busybox(words: &[&str]) -> Result<(), String> {
    let output = Command::new(BUSYBOX).args(words).output().map_err(tried(BUSYBOX))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(format!("{}: {}", words.join(" "), String::from_utf8_lossy(&said).trim()))
}
