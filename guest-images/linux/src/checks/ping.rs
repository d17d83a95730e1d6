//! The network: the host answers, to small packets and to large ones.

use super::network::{busybox, set_up};
use super::{text_of, tried};
use crate::Outcome;

/// What is sent besides the headers, bytes: small; what fits in a frame; and what does not.
const SIZES: [&str; 3] = ["56", "1400", "8000"];

/// The argument is the host's address.
pub(super) fn check(host: &str) -> Outcome {
    let folder = set_up()?;
    for size in SIZES {
        busybox(&["ping", "-q", "-c", "3", "-i", "0.2", "-W", "5", "-s", size, host])?;
    }
    let attribute = |file: &str| text_of(&format!("{folder}/{file}"));
    let queues = std::fs::read_dir(format!("{folder}/queues")).map_err(tried("queues"))?.count();
    Ok(format!("mac={} mtu={} queues={queues}", attribute("address")?, attribute("mtu")?))
}
