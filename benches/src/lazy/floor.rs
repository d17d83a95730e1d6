//! What a page touched at the destination takes at least: one round trip, and one swap-in at the source. Both are measured
//! alone, with nothing in between, at the rhythm of the touches: one behind the other, and apart.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use memory_agent::{Mapping, PAGE_SIZE, PageCache, PageState, Probe, page_out};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use workload_guest::pattern::{WORDS, key, word};

use super::touch;
use crate::stop;
use crate::sys::OwnMap;
use crate::table::Row;

/// Its name in tables.
pub(super) const SUBJECT: &str = "floor";

const PAGE: usize = PAGE_SIZE as usize;
/// Round trips, and pages read.
const SAMPLES: u64 = 2000;
/// The same, apart.
const SAMPLES_APART: u64 = 300;
/// One page in so many is read: what the kernel reads along with one is never the next.
const STRIDE: u64 = 16;
/// Time between those that come apart, about as between the touches of `apart`: `touch_every_ms`.
const APART: Duration = Duration::from_millis(10);
/// Bytes of a request for a page, as long as the monitor's.
const REQUEST: usize = 48;
/// Longer than a round trip takes on any host.
const SILENCE: Duration = Duration::from_secs(10);

pub(super) fn measure() -> Result<Row> {
    // Two hosts have no CPU in common, and where there are two here, the ends have one each.
    let each = Cpus { asks: 0, answers: available_parallelism()?.get().min(2) - 1 };
    let in_a_row = round_trips(each, SAMPLES, Duration::ZERO)?;
    let apart = round_trips(each, SAMPLES_APART, APART)?;
    let on_one_cpu = round_trips(Cpus { asks: 0, answers: 0 }, SAMPLES, Duration::ZERO)?;
    let swap_ins_in_a_row = swap_ins(SAMPLES, Duration::ZERO)?;
    let swap_ins_apart = swap_ins(SAMPLES_APART, APART)?;
    let values = BTreeMap::from([
        ("round_trip_us", quantile_us(&in_a_row, 0.5)?),
        ("round_trip_p99_us", quantile_us(&in_a_row, 0.99)?),
        ("round_trip_apart_us", quantile_us(&apart, 0.5)?),
        ("round_trip_one_cpu_us", quantile_us(&on_one_cpu, 0.5)?),
        ("swap_in_us", quantile_us(&swap_ins_in_a_row, 0.5)?),
        ("swap_in_p99_us", quantile_us(&swap_ins_in_a_row, 0.99)?),
        ("swap_in_apart_us", quantile_us(&swap_ins_apart, 0.5)?),
    ]);
    Ok(Row { subject: SUBJECT.to_owned(), mode: touch::MODE.to_owned(), values })
}

/// Where the ends of a connection run, by their place among the CPUs that this process may use.
#[derive(Clone, Copy)]
struct Cpus {
    asks: usize,
    answers: usize,
}

/// The calling thread runs on no other CPU from now on.
fn stay_on(place: usize) -> std::io::Result<()> {
    let allowed = sched_getaffinity(None)?;
    let mut one = CpuSet::new();
    (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).nth(place).into_iter().for_each(|cpu| one.set(cpu));
    Ok(sched_setaffinity(None, &one)?)
}

/// So many round trips, with so much time between one and the next.
fn round_trips(cpus: Cpus, samples: u64, pause: Duration) -> Result<Vec<Duration>> {
    let listener = TcpListener::bind("127.0.0.1:0").context("loopback TCP")?;
    let mut asks = TcpStream::connect(listener.local_addr()?)?;
    let (mut answers, _) = listener.accept()?;
    for end in [&asks, &answers] {
        end.set_nodelay(true)?;
        end.set_read_timeout(Some(SILENCE))?;
    }
    thread::scope(|scope| {
        let server = scope.spawn(move || -> std::io::Result<()> {
            stay_on(cpus.answers)?;
            let (mut request, page) = ([0; REQUEST], [0x5a; PAGE]);
            for _ in 0..samples {
                answers.read_exact(&mut request)?;
                answers.write_all(&page)?;
            }
            Ok(())
        });
        let client = scope.spawn(move || -> std::io::Result<Vec<_>> {
            stay_on(cpus.asks)?;
            let mut page = [0; PAGE];
            let trip = |_| {
                thread::sleep(pause);
                let start = Instant::now();
                asks.write_all(&[0; REQUEST])?;
                asks.read_exact(&mut page)?;
                Ok(start.elapsed())
            };
            // Its end goes with it: whoever still waits for a request hears that there is none.
            (0..samples).map(trip).collect()
        });
        let times = client.join().map_err(|_| anyhow!("the client panicked"))?.context("loopback TCP")?;
        let served = server.join().map_err(|_| anyhow!("the server panicked"))?;
        served.context("loopback TCP")?;
        Ok(times)
    })
}

/// So many pages with contents such as the guest's, which zram cannot compress, with so much time between one and the next.
fn swap_ins(samples: u64, pause: Duration) -> Result<Vec<Duration>> {
    let pages = samples * STRIDE;
    let file = File::from(memfd_create("thermocline-bench", MemfdFlags::CLOEXEC)?);
    file.set_len(pages * PAGE_SIZE)?;
    let map = OwnMap::new(file.as_fd(), (pages * PAGE_SIZE) as usize)?;
    for number in 0..pages {
        stop::check()?;
        let key = key(number, 1, 0);
        let bytes: Vec<u8> = (0..WORDS).flat_map(|index| word(key, index).to_le_bytes()).collect();
        file.write_all_at(&bytes, number * PAGE_SIZE)?;
    }
    let mapping = Mapping::new(file.as_fd(), 0, map.address(), pages * PAGE_SIZE)?;
    page_out(&mapping, std::slice::from_ref(&(0..pages))).context("the pages to be swapped in")?;
    let states = PageCache.residency(&mapping, 0..pages)?;
    let mut page = [0; PAGE];
    let mut times = Vec::new();
    for sample in 0..samples {
        stop::check()?;
        // In an order that the kernel cannot foresee: the factor has no divisor in common with the number of samples.
        let number = sample * 1009 % samples * STRIDE;
        if states.get(number) != Some(PageState::Swapped) {
            continue;
        }
        thread::sleep(pause);
        let start = Instant::now();
        file.read_exact_at(&mut page, number * PAGE_SIZE)?;
        times.push(start.elapsed());
    }
    ensure!(times.len() as u64 >= samples / 2, "most pages of this benchmark's own were not paged out");
    Ok(times)
}

fn quantile_us(times: &[Duration], share: f64) -> Result<f64> {
    let mut times = times.to_vec();
    times.sort_unstable();
    let time = times.get((times.len() as f64 * share) as usize).context("nothing was measured")?;
    Ok(time.as_secs_f64() * 1e6)
}
