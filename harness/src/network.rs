//! Two hosts on one machine: two network namespaces, a pair of interfaces between them, and a limit on its rate.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};

/// Names of namespaces that are there.
static THERE: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Address of the first host.
const FIRST: &str = "10.177.0.1";
/// Address of the second host. Nobody sees either outside of the two namespaces.
pub const SECOND: &str = "10.177.0.2";

/// Two namespaces, gone when this is dropped.
#[derive(Debug)]
pub struct Network {
    names: [String; 2],
}

impl Network {
    /// Two hosts, the first of which sends no faster than this.
    ///
    /// # Errors
    /// When `ip` or `tc` cannot do it.
    pub fn with_rate(mbit_per_second: u32) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let own = format!("tc{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let network = Self { names: [format!("{own}a"), format!("{own}b")] };
        let [first, second] = &network.names;
        for name in &network.names {
            there().push(name.clone());
            run(&format!("ip netns add {name}"))?;
        }
        // Made inside, so that nothing of it is ever in the host's own namespace.
        run(&format!("ip -n {first} link add v0 type veth peer name v0 netns {second}"))?;
        for (name, address) in [(first, FIRST), (second, SECOND)] {
            run(&format!("ip -n {name} address add {address}/24 dev v0"))?;
            run(&format!("ip -n {name} link set v0 up"))?;
            run(&format!("ip -n {name} link set lo up"))?;
        }
        run(&format!(
            "ip netns exec {first} tc qdisc add dev v0 root tbf rate {mbit_per_second}mbit burst 256kb latency 100ms"
        ))?;
        Ok(network)
    }

    /// What a command of the first or second host begins with.
    pub fn prefix(&self, host: usize) -> [&str; 4] {
        ["ip", "netns", "exec", &self.names[host]]
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.names.iter().for_each(|name| remove(name));
    }
}

/// For when the program ends in the middle.
pub fn remove_all() {
    let names = there().clone();
    names.iter().for_each(|name| remove(name));
}

/// A list is whole, whoever panicked beside it.
pub(crate) fn there() -> MutexGuard<'static, Vec<String>> {
    THERE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn remove(name: &str) {
    if !there().iter().any(|there| there == name) {
        return;
    }
    // The interfaces go with it.
    match run(&format!("ip netns del {name}")) {
        Ok(()) => there().retain(|there| there != name),
        Err(e) => eprintln!("the network namespace {name} is left behind: {e:#}"),
    }
}

pub(crate) fn run(command: &str) -> Result<()> {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .output()
        .with_context(|| format!("`{command}` cannot be started"))?;
    ensure!(output.status.success(), "`{command}`: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
