//! `--net`, as `run` and `receive` have it.

use std::collections::BTreeMap;

use anyhow::Context;
use clap::Args;
use command_line::End;

use crate::devices::virtio::net::{NetBackend, NetConfig, NetOptions};
use crate::exit::ExitCode;
use crate::record::Name;

/// Network interfaces.
#[derive(Debug, Args)]
pub(super) struct NetArguments {
    /// Give the guest a network interface whose other end is a tap of this host: `tap=NAME`, or `fd=N` for one that is open;
    /// `mac=52:54:00:12:34:56` (one at random otherwise), `mtu=BYTES` (that of the tap), `queues=N` (1), `id=NAME` (net0, net1, …).
    /// Can be given several times. A guest that comes from elsewhere has an address and an MTU: none is to be given, or the same; one
    /// that has others is refused.
    #[arg(long, value_name = "tap=NAME[,KEY=VALUE…]")]
    net: Vec<NetOptions>,
}

/// Network interfaces with their other ends.
#[derive(Debug, Default)]
pub(super) struct Nets {
    /// What the guest sees of each, in the order in which they were asked for.
    pub(super) configs: Vec<(Name, NetConfig)>,
    /// The other end of each.
    pub(super) backends: BTreeMap<Name, NetBackend>,
}

impl NetArguments {
    /// Opens the taps.
    ///
    /// # Errors
    /// When one cannot be used, or two interfaces have one id.
    pub(super) fn open(&self) -> Result<Nets, End> {
        let usage = |e: anyhow::Error| End::new(ExitCode::Usage, e);
        let mut nets = Nets::default();
        for (number, options) in self.net.iter().enumerate() {
            let own = Name::try_from(format!("net{number}")).map_err(|e| usage(e.into()))?;
            let id = options.id.clone().unwrap_or(own);
            let tap = options.open().with_context(|| format!("the network interface '{id}'"))?;
            let config = options.config(&tap).with_context(|| format!("the network interface '{id}'"))?;
            let backend = NetBackend { tap, mac: options.mac, mtu: options.mtu };
            if nets.backends.insert(id.clone(), backend).is_some() {
                return Err(usage(anyhow::anyhow!(
                    "two network interfaces are named '{id}': give each an id of its own"
                )));
            }
            nets.configs.push((id, config));
        }
        Ok(nets)
    }
}
