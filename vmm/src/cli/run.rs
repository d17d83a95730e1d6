//! `thermocline run`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::{ArgAction, Args};
use command_line::End;
use memory_agent::{AgentOptions, ByteSize};

use super::choices::Cpu;
use super::nets::NetArguments;
use super::vsock::VsockArguments;
use super::{AgentArguments, ConsoleArguments, DescriptionArguments, end};
use crate::PROGRAM;
use crate::boot::{Bootable, Kernel, Payload};
use crate::config::{DEFAULT_CPUS, DEFAULT_KERNEL, DEFAULT_MEMORY, DiskConfig, VmConfig};
use crate::control::controller::Controller;
use crate::devices::host::Backends;
use crate::devices::virtio::balloon::BalloonConfig;
use crate::devices::virtio::net::NetBackend;
use crate::doctor;
use crate::exit::ExitCode;
use crate::kvm::{self, KvmError};
use crate::machine::Builder;
use crate::monitor::Monitor;
use crate::record::Name;

/// Options of `thermocline run`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Guest memory: a number with K, M, G or T, also written KiB or KB and so on, always powers of 1024; or in bytes.
    #[arg(long, short = 'm', value_name = "SIZE", default_value_t = DEFAULT_MEMORY)]
    memory: ByteSize,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CPUS)]
    cpus: u8,
    /// What the guest is told of its processor: all that this host's has, or what a level of the x86-64 psABI has, so that the guest can go
    /// to another host that has as much.
    #[arg(long, value_name = "MODEL", value_enum, default_value_t = Cpu::Host)]
    cpu: Cpu,
    /// What to boot: `workload`, the embedded guest, with its options, such as
    /// `workload:working-set=64MiB,cold=384MiB,rate=2000`; or the path of a Linux bzImage (a distribution's vmlinuz), or of
    /// an ELF with a PVH entry point (a vmlinux, a firmware).
    #[arg(long, value_name = "KERNEL", default_value = DEFAULT_KERNEL)]
    kernel: String,
    /// An initramfs for the kernel.
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// The kernel's command line, as it is: nothing is added to it. `console=ttyS0` when it is left out.
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    #[command(flatten)]
    consoles: ConsoleArguments,
    /// Give the guest the host's randomness, by virtio-rng.
    #[arg(long, value_name = "on|off", default_value = "on", action = ArgAction::Set, value_parser = on_or_off)]
    rng: bool,
    /// A disk on a raw image or a block device; may be repeated. `readonly`, `direct` (past the host's page cache), `id=NAME`,
    /// `serial=TEXT` and `queues=N` may follow; a comma in a path is written twice.
    #[arg(long = "disk", value_name = "path=FILE[,…]")]
    disks: Vec<DiskConfig>,
    /// A balloon, by which the guest gives memory back: what it has free by itself, and more when `ctl balloon` asks. `on`, or
    /// `free-page-reporting=off`, `deflate-on-oom=off`.
    #[arg(long, value_name = "on|KEY=…")]
    balloon: Option<BalloonConfig>,
    #[command(flatten)]
    nets: NetArguments,
    #[command(flatten)]
    vsock: VsockArguments,
    /// End when the guest resets its machine; otherwise the machine starts anew.
    #[arg(long)]
    no_reboot: bool,
    /// Make a control socket at this path.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[command(flatten)]
    agent: AgentArguments,
    #[command(flatten)]
    pub(super) description: DescriptionArguments,
}

/// A switch as the guest's own options have them.
fn on_or_off(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("it is on or off"),
    }
}

/// Checks everything that can be checked before anything is made.
///
/// # Errors
/// The first thing that cannot be.
pub(super) fn check(arguments: &Arguments) -> Result<(), End> {
    let Described { config, .. } = describe(arguments)?;
    check_processor(&config)?;
    Bootable::open(&config.payload).context("the guest cannot boot")?;
    config.devices()?;
    arguments.consoles.check()
}

/// Whether this host can be the processor that was asked for.
fn check_processor(config: &VmConfig) -> Result<(), End> {
    kvm::check_model(config.cpu, config.memory).map_err(|e| match e {
        KvmError::Model(e) => End::new(ExitCode::Usage, e),
        e => anyhow::Error::from(e).context("no machine").into(),
    })
}

/// What the options describe.
struct Described {
    config: VmConfig,
    /// Taps, which are open: what they can do is part of the machine.
    nets: BTreeMap<Name, NetBackend>,
    agent: Option<AgentOptions>,
}

fn describe(arguments: &Arguments) -> Result<Described, End> {
    let usage = |e: anyhow::Error| End::new(ExitCode::Usage, e);
    let agent = arguments.agent.options()?;
    let nets = arguments.nets.open()?;
    let config = VmConfig {
        memory: arguments.memory,
        cpus: arguments.cpus,
        cpu: arguments.cpu.into(),
        payload: Payload {
            kernel: arguments.kernel.parse::<Kernel>().map_err(|e| usage(e.into()))?,
            initramfs: arguments.initramfs.clone(),
            command_line: arguments.cmdline.clone(),
        },
        rng: arguments.rng,
        disks: arguments.disks.clone(),
        balloon: arguments.balloon,
        console: arguments.consoles.has_virtio(),
        nets: nets.configs,
        vsock: arguments.vsock.config(),
        api_socket: arguments.api_socket.clone(),
    }
    .validate()?;
    Ok(Described { config, nets: nets.backends, agent })
}

pub(super) fn main(arguments: Arguments) -> Result<(), End> {
    let Described { config, nets, agent } = describe(&arguments)?;
    check_processor(&config)?;
    let bootable = Bootable::open(&config.payload).context("the guest cannot boot")?;
    if bootable.is_linux() && doctor::emulates_ring_0() {
        PROGRAM.say(
            "this host's KVM emulates ring 0 of a guest (PVM): Linux takes tens of minutes to boot, if it does; use a host with AMD-V or VT-x, or the embedded workload",
        );
    }
    let mut consoles = arguments.consoles.open()?;
    let devices = config.devices()?;
    let backends = Backends {
        are_elsewhere: false,
        consoles: consoles.take_outputs(),
        disks: config.disk_backends()?,
        nets,
        vsocks: arguments.vsock.open()?,
    };
    let builder = Builder::new(backends);
    let machine = builder.new_machine(config.memory, config.cpus, config.cpu, &devices).context("no machine")?;
    machine.boot(bootable).context("the guest cannot boot")?;
    let controller = Arc::new(Controller::new(agent).context("no monitor")?);
    let machine = Arc::new(machine);
    controller.set_machine(Arc::clone(&machine), None).context("no monitor")?;
    let monitor = Monitor::new(controller, &mut consoles, config.api_socket.as_deref())
        .context("no monitor")?
        .with_reboots(!arguments.no_reboot);
    machine.resume();
    drop(machine);
    end::of_monitor(monitor.run().context("the monitor failed")?)
}
