//! Two hosts on one machine: two network namespaces, a pair of interfaces between them with a limit on its rate, and a second
//! network for their guests.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Names of namespaces that are there.
static THERE: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Address of the first host.
pub const FIRST: &str = "10.177.0.1";
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
        let network = Self::new()?;
        let first = &network.names[0];
        run(&format!(
            "ip netns exec {first} tc qdisc add dev v0 root tbf rate {mbit_per_second}mbit burst 256kb latency 100ms"
        ))?;
        Ok(network)
    }

    /// Two hosts.
    ///
    /// # Errors
    /// When `ip` cannot do it.
    pub fn new() -> Result<Self> {
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
        Ok(network)
    }

    /// Gives both hosts a tap of this name for a guest, and joins the two by a network of their own, a bridge on each host.
    /// The first host has `address` there, such as `172.31.9.1/24`.
    ///
    /// # Errors
    /// When `ip` cannot do it.
    pub fn add_guest_network(&self, tap: &str, address: &str) -> Result<()> {
        let [first, second] = &self.names;
        run(&format!("ip -n {first} link add v1 type veth peer name v1 netns {second}"))?;
        for name in &self.names {
            up_without_address(name, "v1")?;
            add_tap(name, tap)?;
            add_bridge(name, &["v1", tap])?;
        }
        run(&format!("ip -n {first} address add {address} dev {BRIDGE}"))
    }

    /// Puts the calling thread into the namespace of the first or second host, for good.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self, host: usize) -> Result<()> {
        enter(&self.names[host])
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

/// The name of every bridge, each in a namespace of its own.
const BRIDGE: &str = "b0";

/// Makes a tap in this namespace that is up and has vnet headers.
pub(crate) fn add_tap(namespace: &str, tap: &str) -> Result<()> {
    run(&format!("ip -n {namespace} tuntap add dev {tap} mode tap vnet_hdr"))?;
    up_without_address(namespace, tap)
}

/// Joins interfaces of this namespace by a bridge, so that what comes from one goes to the others.
pub(crate) fn add_bridge(namespace: &str, interfaces: &[&str]) -> Result<()> {
    run(&format!("ip -n {namespace} link add {BRIDGE} type bridge"))?;
    up_without_address(namespace, BRIDGE)?;
    interfaces.iter().try_for_each(|interface| run(&format!("ip -n {namespace} link set {interface} master {BRIDGE}")))
}

/// Sets an interface up for which the kernel makes no address, so that it sends nothing of its own.
fn up_without_address(namespace: &str, interface: &str) -> Result<()> {
    // A kernel without IPv6 makes none.
    if Path::new("/proc/sys/net/ipv6").exists() {
        run(&format!("ip -n {namespace} link set {interface} addrgenmode none"))?;
    }
    run(&format!("ip -n {namespace} link set {interface} up"))
}

/// Puts the calling thread into a namespace, for good.
pub(crate) fn enter(namespace: &str) -> Result<()> {
    let path = format!("/run/netns/{namespace}");
    let file = File::open(&path).with_context(|| path.clone())?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).context(path)
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
