//! Two hosts on one machine: two network namespaces, a pair of interfaces between them, and a limit on its rate.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::PROGRAM;

/// Address of the second host.
pub(crate) const SECOND: &str = "10.178.0.2";

/// Two namespaces, gone when this is dropped.
#[derive(Debug)]
pub(crate) struct Network {
    names: Vec<String>,
}

impl Network {
    /// Two hosts, the first of which sends no faster than this.
    ///
    /// # Errors
    /// When `ip` or `tc` cannot do it.
    pub(crate) fn with_rate(mbit_per_second: u32) -> Result<Self> {
        let own = format!("tcbench{}", std::process::id());
        let (first, second) = (format!("{own}a"), format!("{own}b"));
        let mut network = Self { names: Vec::new() };
        for name in [&first, &second] {
            run(&format!("ip netns add {name}"))?;
            network.names.push(name.clone());
        }
        // Made inside, so that nothing of it is ever in the host's own namespace.
        run(&format!("ip -n {first} link add v0 type veth peer name v0 netns {second}"))?;
        for (name, address) in [(&first, "10.178.0.1"), (&second, SECOND)] {
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
    pub(crate) fn prefix(&self, host: usize) -> [&str; 4] {
        ["ip", "netns", "exec", &self.names[host]]
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // The interfaces go with it.
            if let Err(e) = run(&format!("ip netns del {name}")) {
                PROGRAM.say(format_args!("{e:#}"));
            }
        }
    }
}

fn run(command: &str) -> Result<()> {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .output()
        .with_context(|| format!("`{command}` cannot be started"))?;
    ensure!(output.status.success(), "`{command}`: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
