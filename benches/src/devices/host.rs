//! What the host's own file and tap give, without any guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::tap::{TapNetwork, open_tap};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use workload_guest::frame::{self, HEAD};
use workload_guest::job::Order;
use workload_guest::pattern::Random;

use super::generator::Generator;
use super::machine::rates;
use super::mode::{Disk, Mode, What};
use super::{Place, TAP};
use crate::sys::Requests;

/// Bytes of a vnet header in front of each frame.
const HEADER: usize = 10;

/// Does this for so many milliseconds.
pub(super) fn measure(mode: &Mode, place: &Place, ms: u32) -> Result<BTreeMap<&'static str, f64>> {
    let limit = Duration::from_millis(u64::from(ms));
    let (count, bytes, took, cpu) = match mode.what {
        What::Disk(disk) => file(&disk, place, limit)?,
        What::Send(bytes) | What::Receive(bytes) => {
            let generator = match mode.what {
                What::Receive(_) => Some(Generator::start(&place.network, TAP, bytes)?),
                _ => None,
            };
            let network = Arc::clone(&place.network);
            let is_receiving = generator.is_some();
            // A thread of its own, as it stays in the network's namespace.
            let work = move || tap(&network, bytes as usize, is_receiving, limit);
            std::thread::spawn(work).join().ok().context("the thread at the tap panicked")??
        }
    };
    let mut values = rates(mode, count, bytes, took);
    values.insert("cpu_us_per_request", cpu.as_secs_f64() * 1e6 / count.max(1) as f64);
    Ok(values)
}

/// Requests, bytes, time and CPU time.
type Account = (u64, u64, Duration, Duration);

fn file(disk: &Disk, place: &Place, limit: Duration) -> Result<Account> {
    let mut options = File::options();
    options.read(true).write(true);
    if place.direct {
        options.custom_flags(OFlags::DIRECT.bits().cast_signed());
    }
    let file = options.open(&place.disk).context("the disk's file")?;
    let bytes = u64::from(disk.bytes);
    let (mut random, mut cursor, places) = (Random::new(1), 0, place.bytes / bytes);
    let mut next = || {
        cursor = if disk.order == Order::Random { random.below(places) } else { (cursor + 1) % places };
        cursor * bytes
    };
    let mut requests = Requests::new(&file, disk.is_write(), disk.depth, disk.bytes as usize)?;
    let (start, cpu) = (Instant::now(), cpu_time(ClockId::ProcessCPUTime));
    let mut count = 0;
    while start.elapsed() < limit {
        count += requests.turn(&mut next)?;
    }
    let (took, cpu) = (start.elapsed(), cpu_time(ClockId::ProcessCPUTime) - cpu);
    Ok((count, count * bytes, took, cpu))
}

fn tap(network: &TapNetwork, bytes: usize, is_receiving: bool, limit: Duration) -> Result<Account> {
    network.enter()?;
    let mut tap = open_tap(TAP)?;
    rustix::io::ioctl_fionbio(&tap, true)?;
    let mut buffer = [0; 2048];
    let (packet, mut sequence) = (HEADER + bytes, 0);
    let sum = frame::sum(&buffer[HEADER + HEAD..packet]);
    let (start, cpu) = (Instant::now(), cpu_time(ClockId::ThreadCPUTime));
    let mut count = 0;
    while start.elapsed() < limit {
        let done = if is_receiving {
            tap.read(&mut buffer)
        } else {
            frame::seal(&mut buffer[HEADER..packet], [0xff; 6], [2; 6], sequence, sum);
            sequence += 1;
            tap.write(&buffer[..packet])
        };
        match done {
            Ok(_) => count += 1,
            Err(e) if e.kind() == ErrorKind::WouldBlock => wait(&tap, is_receiving)?,
            Err(e) => return Err(e).context("the tap"),
        }
    }
    Ok((count, count * bytes as u64, start.elapsed(), cpu_time(ClockId::ThreadCPUTime) - cpu))
}

fn wait(tap: &File, is_receiving: bool) -> Result<()> {
    let flags = if is_receiving { PollFlags::IN } else { PollFlags::OUT };
    let limit = rustix::time::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    poll(&mut [PollFd::new(tap, flags)], Some(&limit))?;
    Ok(())
}

fn cpu_time(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned() as u32)
}
