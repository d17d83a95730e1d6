//! `cargo xtask bench devices`: the disk and the network device of Thermocline and of stock QEMU, driven by the very same
//! guest on the same file and tap, and the file and tap themselves.
//!
//! | mode | |
//! |---|---|
//! | `read-4k-1`, `write-4k-1` | random requests of 4 KiB, one at a time |
//! | `read-4k-32`, `write-4k-32` | 32 at a time |
//! | `read-1m`, `write-1m` | requests of 1 MiB one behind the other, two at a time |
//! | `send-64`, `send-1500` | frames from the guest, which nobody takes: the kernel counts them |
//! | `receive-64`, `receive-1500` | frames to the guest from a thread that sends to the tap's interface whatever it takes |
//!
//! | subject | |
//! |---|---|
//! | `thermocline`, `qemu` | virtio over PCI, one queue each; QEMU's disk with an iothread and io_uring, its network in its main loop, without vhost |
//! | `host` | io_uring on the file, reads and writes of the tap's file, in one thread of this program |
//!
//! With `--migrate`: [`migrate`].
//!
//! The guest checks what it reads and what comes, and polls for it unless `--interrupts` is given. Subjects take turns.

mod generator;
mod host;
mod machine;
mod migrate;
mod mode;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Args;
use command_line::Output;
use harness::tap::TapNetwork;

use crate::PROGRAM;
use crate::peer::qemu::Qemu;
use crate::stop;
use crate::subject::thermocline::Thermocline;
use crate::table::{Column, Row, medians, table, write_json};
use machine::Monitor;
use mode::{Mode, What};

/// The tap's name, in a network namespace of its own.
const TAP: &str = "t0";

const COLUMNS: &[Column] = &[
    Column { key: "iops", heading: "requests\na second" },
    Column { key: "mib_s", heading: "MiB\na second" },
    Column { key: "frames_s", heading: "frames\na second" },
    Column { key: "cpu_us_per_request", heading: "CPU µs\neach" },
    Column { key: "vcpu_us_per_request", heading: "vCPU µs\neach" },
    Column { key: "kicks_per_request", heading: "kicks\neach" },
    Column { key: "longest_us", heading: "longest\nµs" },
    Column { key: "lost_percent", heading: "lost\n%" },
];

const LEGEND: &str = "\
CPU: all threads of the monitor but those of vCPUs, which poll; of the host's file the whole process. kicks: times that the guest
told the device of requests, an exit each. lost: of the numbers sent to the guest, those that did not come, as they did not fit
into the tap.";

/// Options of `cargo xtask bench devices`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Also write what was measured to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often everything is measured; the table has medians.
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: u32,
    /// How long each is measured each time, milliseconds.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    ms: u32,
    /// The disk's size, MiB.
    #[arg(long, value_name = "N", default_value_t = 256)]
    disk: u64,
    /// Where the disk's file is made; the folder for temporary files otherwise.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Past the host's page cache.
    #[arg(long)]
    direct: bool,
    /// Have devices interrupt the guest instead of its polling.
    #[arg(long)]
    interrupts: bool,
    /// How the guest moves with its devices, in place of what they do: total time, and downtime as frames see it.
    #[arg(long)]
    migrate: bool,
    /// Only modes whose name contains this; may be repeated.
    #[arg(long, value_name = "NAME")]
    mode: Vec<String>,
    /// Only subjects whose name contains this.
    #[arg(long, value_name = "NAME", default_value = "")]
    subject: String,
}

impl Arguments {
    fn modes(&self) -> Vec<Mode> {
        let is_wanted = |name: &str| self.mode.is_empty() || self.mode.iter().any(|part| name.contains(part.as_str()));
        mode::ALL.into_iter().filter(|mode| is_wanted(mode.name)).collect()
    }
}

/// What subjects have in common.
struct Place {
    disk: PathBuf,
    bytes: u64,
    direct: bool,
    /// Whether guests have a network device.
    has_net: bool,
    network: Arc<TapNetwork>,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    ensure!(Path::new("/dev/kvm").exists(), "there is no /dev/kvm, and without KVM there is nothing to measure");
    ensure!(arguments.runs > 0 && arguments.ms > 0, "--runs and --ms must be 1 at least");
    ensure!((8..=65_536).contains(&arguments.disk), "--disk can be 8 to 65536");
    let qemu = Qemu::find()?;
    let peer = format!("{}; × is the ratio to it", qemu.version());
    let monitors = [Monitor::Thermocline(Thermocline::find("paced")?), Monitor::Qemu(qemu)];
    let modes = arguments.modes();
    let folder = match &arguments.folder {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    };
    let folder = folder.context("a folder for the disk's file")?;
    let place = Place {
        disk: folder.path().join("disk.img"),
        bytes: arguments.disk << 20,
        direct: arguments.direct,
        has_net: modes.iter().any(|mode| !matches!(mode.what, What::Disk(_))),
        network: Arc::new(
            TapNetwork::new(if arguments.migrate { &migrate::TAPS } else { &[TAP] })
                .context("a tap of its own (needs root and iproute2)")?,
        ),
    };
    write_disk(&place)?;
    if arguments.migrate {
        return migrate::main(arguments, &monitors, &place, &peer);
    }
    let rows = medians(&measure_all(arguments, &monitors, &place)?);
    let mut output = Output::default();
    output.line(table(COLUMNS, &rows, |row, other| other.subject == "qemu" && other.mode == row.mode))?;
    output.line(LEGEND)?;
    output.line(format_args!("Medians of {} runs of {} ms. {peer}.", arguments.runs, arguments.ms))?;
    match &arguments.json {
        Some(path) => write_json(path, COLUMNS, &rows),
        None => Ok(()),
    }
}

/// All of the file is there from the beginning: nobody is measured with finding room for it.
fn write_disk(place: &Place) -> Result<()> {
    let mut file = File::create(&place.disk)?;
    let zeros = vec![0; 1 << 20];
    (0..place.bytes >> 20).try_for_each(|_| file.write_all(&zeros)).context("the disk's file")?;
    file.sync_all().context("the disk's file")
}

fn measure_all(arguments: &Arguments, monitors: &[Monitor], place: &Place) -> Result<Vec<Row>> {
    let modes = arguments.modes();
    let mut rows = Vec::new();
    for run in 1..=arguments.runs {
        for monitor in monitors.iter().filter(|monitor| monitor.name().contains(&arguments.subject)) {
            let folder = tempfile::Builder::new().prefix("thermocline-bench-").tempdir()?;
            let machine = monitor.start(place, folder.path(), arguments.interrupts).context(monitor.name())?;
            for mode in &modes {
                let generator = match mode.what {
                    What::Receive(bytes) => Some(generator::Generator::start(&place.network, TAP, bytes)?),
                    _ => None,
                };
                let what = || format!("{} of {}, run {run}", mode.name, monitor.name());
                let values = machine.measure(mode, arguments.ms).with_context(what)?;
                drop(generator);
                add(&mut rows, monitor.name(), mode, values)?;
            }
        }
        if "host".contains(&arguments.subject) {
            for mode in &modes {
                let values =
                    host::measure(mode, place, arguments.ms).with_context(|| format!("{} of host", mode.name))?;
                add(&mut rows, "host", mode, values)?;
            }
        }
        PROGRAM.say(format_args!("run {run} of {} is done", arguments.runs));
    }
    // Modes first: what is to be compared stands together.
    let order = |row: &Row| modes.iter().position(|mode| mode.name == row.mode);
    rows.sort_by_key(order);
    Ok(rows)
}

fn add(rows: &mut Vec<Row>, subject: &str, mode: &Mode, values: BTreeMap<&'static str, f64>) -> Result<()> {
    stop::check()?;
    rows.push(Row { subject: subject.to_owned(), mode: mode.name.to_owned(), values });
    Ok(())
}
