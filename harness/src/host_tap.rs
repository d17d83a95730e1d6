//! A tap with an address of this host's, by which a guest reaches the host itself.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use crate::network::run;

/// A tap interface that is up, gone when this is dropped.
#[derive(Debug)]
pub struct HostTap {
    name: String,
}

impl HostTap {
    /// One with this address of the host's, such as `172.31.7.1/24`.
    ///
    /// # Errors
    /// When `ip` cannot make it: this is not root, or the kernel has no TUN.
    pub fn new(address: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Fifteen characters at most (IFNAMSIZ).
        let name = format!("tc{}t{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        run(&format!("ip tuntap add dev {name} mode tap"))?;
        let tap = Self { name };
        let name = tap.name();
        run(&format!("ip address add {address} dev {name}"))?;
        run(&format!("ip link set {name} up"))?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        if let Err(e) = run(&format!("ip link delete {}", self.name)) {
            eprintln!("the interface {} is left behind: {e:#}", self.name);
        }
    }
}
