//! `cargo xtask bench devices --migrate`: the same guest with one disk and one network device moves to another process on this
//! host, to another tap of the same bridge, while somebody on the network talks to it.
//!
//! | mode | |
//! |---|---|
//! | `idle` | the guest does nothing but send back frames |
//! | `disk` | it has 32 reads and writes of 4 KiB under way all the time too |
//!
//! | subject | |
//! |---|---|
//! | `thermocline`, `qemu` | virtio-blk and virtio-net over PCI; QEMU as in the other modes, with its migration's defaults but for the bandwidth |
//! | `thermocline-bare` | the same guest without devices, for which nobody's frames can tell the downtime |

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use command_line::Output;
use harness::echo;
use harness::tap::TapNetwork;
use workload_guest::block::Coverage;
use workload_guest::job::{DiskJob, Lasts, NetJob, Operation, Order};
use workload_guest::{Command, Options};

use super::machine::{Devices, MIB, Monitor, disk_done};
use super::{Arguments, Place};
use crate::PROGRAM;
use crate::stop;
use crate::subject::{GuestSpec, Host, Migrated};
use crate::table::{Column, Row, medians, table, write_json};

/// The taps of the two processes, and the bridge between them.
pub(super) const TAPS: [&str; 2] = ["t0", "t1"];
const BRIDGE: &str = "b0";
/// [`super::machine::MAC`] in the order of a frame.
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
/// What is said to the guest, and how often.
const FRAME: (usize, Duration) = (200, Duration::from_micros(500));
/// How long the guest is left alone before and behind its move.
const QUIET: Duration = Duration::from_millis(300);

const MODES: [&str; 2] = ["idle", "disk"];

const COLUMNS: &[Column] = &[
    Column { key: "total_ms", heading: "total\nms" },
    Column { key: "downtime_ms", heading: "downtime by\nframes, ms" },
    Column { key: "stall_ms", heading: "by the\nguest, ms" },
    Column { key: "monitor_ms", heading: "by the\nmonitor, ms" },
    Column { key: "lost_frames", heading: "frames\nlost" },
];

const LEGEND: &str = "\
downtime by frames: the longest time in which no frame came back from the guest, to which one is sent every 0.5 ms. By the guest: the
longest time that its vCPU did not run. By the monitor: its own account.";

/// What is measured.
struct Subject<'a> {
    name: &'static str,
    monitor: &'a Monitor,
    has_devices: bool,
}

impl Subject<'_> {
    fn devices<'a>(&self, tap: &'a str) -> Devices<'a> {
        Devices { disk: self.has_devices, tap: self.has_devices.then_some(tap) }
    }
}

pub(super) fn main(arguments: &Arguments, monitors: &[Monitor], place: &Place, peer: &str) -> Result<()> {
    place.network.bridge(&TAPS)?;
    let rows = medians(&measure_all(arguments, monitors, place)?);
    let mut output = Output::default();
    output.line(table(COLUMNS, &rows, |row, other| other.subject == "qemu" && other.mode == row.mode))?;
    output.line(LEGEND)?;
    output.line(format_args!("Medians of {} runs. {peer}.", arguments.runs))?;
    match &arguments.json {
        Some(path) => write_json(path, COLUMNS, &rows),
        None => Ok(()),
    }
}

fn measure_all(arguments: &Arguments, monitors: &[Monitor], place: &Place) -> Result<Vec<Row>> {
    let with = |monitor| Subject { name: Monitor::name(monitor), monitor, has_devices: true };
    let mut subjects: Vec<_> = monitors.iter().map(with).collect();
    let bare = monitors.iter().find(|monitor| matches!(monitor, Monitor::Thermocline(_)));
    subjects.extend(bare.map(|monitor| Subject { name: "thermocline-bare", monitor, has_devices: false }));
    let is_wanted =
        |name: &str| arguments.mode.is_empty() || arguments.mode.iter().any(|part| name.contains(part.as_str()));
    let mut rows = Vec::new();
    for run in 1..=arguments.runs {
        for mode in MODES.into_iter().filter(|mode| is_wanted(mode)) {
            for subject in subjects.iter().filter(|subject| subject.name.contains(&arguments.subject)) {
                // Without a disk there is nothing else to do.
                if !subject.has_devices && mode != "idle" {
                    continue;
                }
                let values = measure(subject, mode, place, arguments.interrupts)
                    .with_context(|| format!("{mode} of {}, run {run}", subject.name))?;
                stop::check()?;
                rows.push(Row { subject: subject.name.to_owned(), mode: mode.to_owned(), values });
            }
        }
        PROGRAM.say(format_args!("run {run} of {} is done", arguments.runs));
    }
    // Modes first: what is to be compared stands together.
    rows.sort_by_key(|row| MODES.iter().position(|mode| *mode == row.mode));
    Ok(rows)
}

fn measure(subject: &Subject<'_>, mode: &str, place: &Place, interrupts: bool) -> Result<BTreeMap<&'static str, f64>> {
    let folder = tempfile::Builder::new().prefix("thermocline-bench-").tempdir()?;
    let workload = Options { working_set: 4096, rate: 1, ..Options::default() };
    let devices = Options { disk: place.bytes, net: true, interrupts, ..workload };
    let spec = GuestSpec { mib: MIB, workload: if subject.has_devices { devices } else { workload } };
    let source = subject.monitor.boot(place, folder.path(), &spec, subject.devices(TAPS[0]))?;
    source.console.ready().with_context(|| source.process.complaints())?;
    let migrate = || move_it(subject, place, folder.path(), &spec, &source);
    if !subject.has_devices {
        let (there, migrated) = migrate()?;
        return figures(&there, &migrated, None);
    }
    if mode == "disk" {
        let fill = Command::Disk(disk_job(1 << 20, 2, Operation::Write, Lasts::Once));
        let done = source.console.device(fill, || Ok(()), disk_done)?;
        ensure!(done.errors == 0, "the disk fails requests: {done:?}");
        source.console.send(Command::Disk(disk_job(4096, 32, Operation::Mixed, Lasts::Forever)))?;
    }
    source.console.send(Command::Net(NetJob::Echo(Lasts::Forever)))?;
    let network: &TapNetwork = &place.network;
    let ((there, migrated), heard) = echo::during(network, BRIDGE, MAC, FRAME, migrate)?;
    ensure!(heard.duplicate + heard.corrupt == 0, "frames came twice or damaged: {heard:?}");
    ensure!(heard.silent_for < QUIET / 2, "nothing came back after the move: {heard:?}");
    figures(&there, &migrated, Some(&heard))
}

fn disk_job(bytes: u32, depth: u32, operation: Operation, lasts: Lasts) -> DiskJob {
    let order = if bytes == 4096 { Order::Random } else { Order::Sequential };
    DiskJob { operation, order, bytes, depth, lasts, coverage: Coverage::Stamp }
}

/// Moves the guest, and leaves it alone for a while before and afterwards.
fn move_it(
    subject: &Subject<'_>,
    place: &Place,
    folder: &Path,
    spec: &GuestSpec,
    source: &Host,
) -> Result<(Host, Migrated)> {
    let there = subject.monitor.receive(place, folder, spec, subject.devices(TAPS[1]))?;
    stop::sleep(QUIET)?;
    source.console.send(Command::ResetStall)?;
    let migrated = subject.monitor.migrate(source, &there)?;
    stop::sleep(QUIET)?;
    Ok((there, migrated))
}

fn figures(there: &Host, migrated: &Migrated, heard: Option<&echo::Heard>) -> Result<BTreeMap<&'static str, f64>> {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let seen = there.console.watch(Duration::ZERO).with_context(|| there.process.complaints())?;
    let mut values = BTreeMap::from([
        ("total_ms", ms(migrated.total)),
        ("stall_ms", seen.longest_stall_us as f64 / 1e3),
        ("monitor_ms", ms(migrated.downtime)),
    ]);
    if let Some(heard) = heard {
        values.insert("downtime_ms", ms(heard.longest_gap));
        values.insert("lost_frames", heard.lost as f64);
    }
    Ok(values)
}
