//! `thermocline receive`

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use command_line::End;
use memory_agent::{AgentOptions, ByteSize};

use super::nets::NetArguments;
use super::vsock::VsockArguments;
use super::{AgentArguments, ConsoleArguments, DescriptionArguments, end};
use crate::PROGRAM;
use crate::config::{DiskConfig, DiskError, check_socket};
use crate::control::controller::Controller;
use crate::devices::host::Backends;
use crate::exit::ExitCode;
use crate::incoming::{Incoming, Limits};
use crate::migration::destination::Terms;
use crate::migration::link::{Address, Listener};
use crate::monitor::Monitor;

/// Options of `thermocline receive`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where to listen: `tcp:HOST:PORT` (port 0 chooses one) or `unix:PATH`.
    #[arg(long, value_name = "ADDRESS")]
    listen: String,
    #[command(flatten)]
    consoles: ConsoleArguments,
    /// The image of a disk that the guest has, as with `run`; `id=NAME` says which, `disk0`, `disk1` … when left out.
    #[arg(long = "disk", value_name = "path=FILE[,…]")]
    disks: Vec<DiskConfig>,
    #[command(flatten)]
    nets: NetArguments,
    #[command(flatten)]
    vsock: VsockArguments,
    /// Make a control socket at this path.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[command(flatten)]
    agent: AgentArguments,
    /// Refuse machines with more memory than this [default: what this host has of memory and swap].
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<ByteSize>,
    /// How many seconds the source of a guest whose memory is still to come may stay away. After that the guest is stopped here until
    /// it comes back.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    source_lost_after: u64,
    /// End with a code at the first connection over which no guest comes, whatever the reason, in place of waiting for the next.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    pub(super) description: DescriptionArguments,
}

/// Checks everything that can be checked before anything is made.
///
/// # Errors
/// The first thing that cannot be.
pub(super) fn check(arguments: &Arguments) -> Result<(Address, Option<AgentOptions>), End> {
    let usage = |e: anyhow::Error| End::new(ExitCode::Usage, e);
    let address: Address = arguments.listen.parse().map_err(|e| usage(anyhow::Error::new(e)))?;
    let agent = arguments.agent.options()?;
    check_socket(arguments.api_socket.as_deref())?;
    arguments.consoles.check()?;
    Ok((address, agent))
}

pub(super) fn main(arguments: Arguments) -> Result<(), End> {
    let (address, agent) = check(&arguments)?;
    let nets = arguments.nets.open()?.backends;
    let listener = Listener::bind(&address).map_err(|e| End::new(ExitCode::Failure, e))?;
    let mut consoles = arguments.consoles.open()?;
    let disks = DiskConfig::named(&arguments.disks).map_err(End::from)?;
    let disks = disks.into_iter().map(|(id, disk)| Ok((id, disk.arriving()?))).collect::<Result<_, _>>();
    let disks = disks.map_err(|e: DiskError| End::from(e))?;
    let terms = Terms { source_timeout: Duration::from_secs(arguments.source_lost_after), once: arguments.once };
    let limits = Limits { terms, ..Limits::default() };
    let limits = arguments.max_memory.map_or(limits, |memory| Limits { memory, ..limits });
    let bound = listener.address().unwrap_or(address);
    let vsocks = arguments.vsock.open()?;
    let backends = Backends { consoles: consoles.take_outputs(), are_elsewhere: true, disks, nets, vsocks };
    let incoming = Incoming::new(listener, limits, backends).context("no monitor")?;
    let controller = Arc::new(Controller::new(agent).context("no monitor")?);
    let monitor = Monitor::new(controller, &mut consoles, arguments.api_socket.as_deref()).context("no monitor")?;
    PROGRAM.say(format_args!("waiting for a guest on {bound}"));
    end::of_monitor(monitor.with_incoming(incoming).run().context("the monitor failed")?)
}
