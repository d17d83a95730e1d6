//! A monitor with a guest that has a disk and a network device, and what the guest does with them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use workload_guest::block::Coverage;
use workload_guest::device_report::{DiskDone, NetDone};
use workload_guest::job::{DiskJob, Lasts, Operation, Order};
use workload_guest::{Command, Line, Options};

use super::mode::{Mode, What};
use super::{Place, TAP};
use crate::peer::qemu::Qemu;
use crate::subject::thermocline::Thermocline;
use crate::subject::{GuestSpec, Host, Migrated, Subject};

/// Guest RAM: the guest, its buffers, and its record of the disk.
pub(super) const MIB: u64 = 64;
/// The address of the guest's network device.
pub(super) const MAC: &str = "52:54:00:00:00:07";

/// Who is measured.
#[derive(Clone, Debug)]
pub(super) enum Monitor {
    Thermocline(Thermocline),
    Qemu(Qemu),
}

impl Monitor {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Thermocline(_) => "thermocline",
            Self::Qemu(_) => "qemu",
        }
    }

    /// Boots the guest with the place's disk and tap, and has it write the whole disk.
    pub(super) fn start(&self, place: &Place, folder: &Path, interrupts: bool) -> Result<Machine> {
        let workload = Options {
            working_set: 4096,
            rate: 1,
            disk: place.bytes,
            net: place.has_net,
            interrupts,
            ..Options::default()
        };
        let spec = GuestSpec { mib: MIB, workload };
        let host = self.boot(place, folder, &spec, Devices { disk: true, tap: place.has_net.then_some(TAP) })?;
        host.console.ready().with_context(|| host.process.complaints())?;
        let machine = Machine { host };
        machine.fill()?;
        Ok(machine)
    }
}

/// What devices a guest has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Devices<'a> {
    /// The place's disk.
    pub(super) disk: bool,
    /// A network device, with this tap.
    pub(super) tap: Option<&'a str>,
}

impl Monitor {
    /// Boots a guest with these devices.
    pub(super) fn boot(&self, place: &Place, folder: &Path, spec: &GuestSpec, devices: Devices<'_>) -> Result<Host> {
        let (prefix, options) = (place.network.prefix(), self.options(place, devices));
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        match self {
            Self::Thermocline(thermocline) => thermocline.run_with(&prefix, folder, spec, &options),
            Self::Qemu(qemu) => qemu.run_behind(&prefix, folder, spec, &options),
        }
    }

    /// Waits for such a guest.
    pub(super) fn receive(&self, place: &Place, folder: &Path, spec: &GuestSpec, devices: Devices<'_>) -> Result<Host> {
        let (prefix, options) = (place.network.prefix(), self.options(place, devices));
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        match self {
            Self::Thermocline(thermocline) => {
                thermocline.receive_with(&prefix, "tcp:127.0.0.1:0", (folder, "destination"), spec, &options)
            }
            Self::Qemu(qemu) => qemu.receive_behind(&prefix, folder, spec, &options),
        }
    }

    /// Moves a guest.
    pub(super) fn migrate(&self, source: &Host, destination: &Host) -> Result<Migrated> {
        let subject: &dyn Subject = match self {
            Self::Thermocline(thermocline) => thermocline,
            Self::Qemu(qemu) => qemu,
        };
        subject.migrate(source, destination, &mut || Ok(()))
    }

    /// The monitor's options for these devices.
    fn options(&self, place: &Place, Devices { disk, tap }: Devices<'_>) -> Vec<String> {
        let path = place.disk.display();
        let mut options: Vec<[String; 2]> = Vec::new();
        match self {
            Self::Thermocline(_) => {
                let direct = if place.direct { ",direct" } else { "" };
                options.extend(disk.then(|| ["--disk".into(), format!("path={path}{direct}")]));
                options.extend(tap.map(|tap| ["--net".into(), format!("tap={tap},mac={MAC}")]));
            }
            Self::Qemu(_) => {
                let direct = if place.direct { "on" } else { "off" };
                let file = format!("driver=file,node-name=file,filename={path},aio=io_uring,cache.direct={direct}");
                let of_disk = [
                    ["-object", "iothread,id=io"],
                    ["-blockdev", &file],
                    ["-blockdev", "driver=raw,node-name=disk,file=file"],
                    ["-device", "virtio-blk-pci,drive=disk,iothread=io,disable-legacy=on"],
                ];
                options.extend(of_disk.into_iter().filter(|_| disk).map(|option| option.map(str::to_owned)));
                if let Some(tap) = tap {
                    let tap = format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off");
                    options.push(["-netdev".into(), tap]);
                    options.push(["-device".into(), format!("virtio-net-pci,netdev=net,mac={MAC},disable-legacy=on")]);
                }
            }
        }
        options.concat()
    }
}

/// A guest at work.
pub(super) struct Machine {
    host: Host,
}

/// CPU time used so far, by the threads of vCPUs and by all others.
#[derive(Clone, Copy, Default)]
struct Cpu {
    vcpus: Duration,
    others: Duration,
}

/// How many requests or frames, of how many bytes, in which time.
struct Done {
    count: u64,
    bytes: u64,
    took_us: u64,
    longest_us: Option<u64>,
    lost: Option<u64>,
    kicks: u64,
}

impl Machine {
    /// Writes every block once, so that each that is read later can be checked.
    fn fill(&self) -> Result<()> {
        let job = DiskJob {
            operation: Operation::Write,
            order: Order::Sequential,
            bytes: 1 << 20,
            depth: 2,
            lasts: Lasts::Once,
            coverage: Coverage::Stamp,
        };
        let done = self.host.console.device(Command::Disk(job), || Ok(()), disk_done)?;
        ensure!(done.errors == 0, "the disk fails requests: {done:?}");
        Ok(())
    }

    /// Has the guest do this for so many milliseconds.
    pub(super) fn measure(&self, mode: &Mode, ms: u32) -> Result<BTreeMap<&'static str, f64>> {
        let mut before = Cpu::default();
        let begun = || {
            before = self.cpu()?;
            Ok(())
        };
        let console = &self.host.console;
        let done = match mode.what {
            What::Disk(_) => of_disk(&console.device(mode.command(ms), begun, disk_done)?)?,
            What::Send(bytes) | What::Receive(bytes) => {
                of_net(&console.device(mode.command(ms), begun, net_done)?, bytes)?
            }
        };
        let after = self.cpu()?;
        ensure!(done.count > 0, "nothing was done; the monitor says: {}", self.host.process.complaints());
        let each = |time: Duration| time.as_secs_f64() * 1e6 / done.count as f64;
        let mut values = rates(mode, done.count, done.bytes, Duration::from_micros(done.took_us));
        values.insert("cpu_us_per_request", each(after.others.saturating_sub(before.others)));
        values.insert("vcpu_us_per_request", each(after.vcpus.saturating_sub(before.vcpus)));
        values.insert("kicks_per_request", done.kicks as f64 / done.count as f64);
        values.extend(done.longest_us.map(|us| ("longest_us", us as f64)));
        values.extend(done.lost.map(|lost| ("lost_percent", lost as f64 * 100.0 / (lost + done.count) as f64)));
        Ok(values)
    }

    fn cpu(&self) -> Result<Cpu> {
        let process = &self.host.process;
        let vcpus = process.cpu_time_of(|name| name.starts_with("vcpu") || name.starts_with("CPU "))?;
        Ok(Cpu { vcpus, others: process.cpu_time()?.saturating_sub(vcpus) })
    }
}

pub(super) fn disk_done(line: Line) -> Option<DiskDone> {
    if let Line::DiskDone(done) = line { Some(done) } else { None }
}

fn net_done(line: Line) -> Option<NetDone> {
    if let Line::NetDone(done) = line { Some(done) } else { None }
}

fn of_disk(done: &DiskDone) -> Result<Done> {
    ensure!(done.errors == 0 && done.bad == 0, "the disk lost something: {done:?}");
    let DiskDone { requests, bytes, took_us, longest_us, kicks, .. } = *done;
    Ok(Done { count: requests, bytes, took_us, longest_us: Some(longest_us), lost: None, kicks })
}

fn of_net(done: &NetDone, bytes: u32) -> Result<Done> {
    ensure!(done.corrupt == 0 && done.duplicate == 0, "the network spoilt something: {done:?}");
    let count = done.sent.max(done.received);
    let lost = (done.received > 0).then_some(done.lost);
    let bytes = count * u64::from(bytes);
    Ok(Done { count, bytes, took_us: done.took_us, longest_us: None, lost, kicks: done.kicks })
}

/// What a mode's rates are called.
pub(super) fn rates(mode: &Mode, count: u64, bytes: u64, took: Duration) -> BTreeMap<&'static str, f64> {
    let each_second = |count: u64| count as f64 / took.as_secs_f64();
    match mode.what {
        What::Disk(disk) if disk.bytes > 4096 => BTreeMap::from([("mib_s", each_second(bytes) / (1 << 20) as f64)]),
        What::Disk(_) => BTreeMap::from([("iops", each_second(count))]),
        What::Send(_) | What::Receive(_) => BTreeMap::from([("frames_s", each_second(count))]),
    }
}
