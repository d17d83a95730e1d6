//! Everything at once, for as long as the host wants: what a guest that moves between hosts must not notice.
//!
//! | to read about | open |
//! |---|---|
//! | writes to the disk, each confirmed before the next | `disk_log.rs` |
//! | reads from the disk | `disk_reads.rs` |
//! | memory, by a thread on each processor | `memory.rs` |
//! | clocks, by a thread on each processor | `clock.rs`, `tsc.rs` |
//!
//! The TCP stream to and from the host (`linux_guest::stream`) is what says when it is over.

mod clock;
mod disk_log;
mod disk_reads;
mod memory;
mod tsc;

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, Scope, ScopedJoinHandle, scope, sleep};
use std::time::{Duration, Instant};

use linux_guest::stream;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::disk::{self, drop_caches, mounted};
use super::{DEVICE_TIMEOUT, network, tried};
use crate::{Outcome, news};

/// Between two frames of the stream.
const STREAM_PAUSE: Duration = Duration::from_millis(5);
/// Between two lines that say how far it is.
const NEWS_PERIOD: Duration = Duration::from_secs(2);

/// What all threads have in common.
#[derive(Debug, Default)]
struct Shared {
    /// The end has come: each ends with what it has found.
    over: AtomicBool,
    /// Records that are on the disk, as it has confirmed.
    records: AtomicU64,
    /// Reads from the disk.
    reads: AtomicU64,
    /// Bytes of the stream, and of the host's.
    sent: AtomicU64,
    received: AtomicU64,
    /// Pages looked at.
    pages: AtomicU64,
    /// Looks at the clocks.
    clocks: AtomicU64,
}

impl Shared {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn words(&self) -> String {
        let counts = [
            ("records", &self.records),
            ("reads", &self.reads),
            ("sent", &self.sent),
            ("received", &self.received),
            ("pages", &self.pages),
            ("clocks", &self.clocks),
        ];
        counts.map(|(name, count)| format!("{name}={}", count.load(Ordering::Relaxed))).join(" ")
    }
}

/// The argument is where on the host the other end of the stream listens, `ADDRESS:PORT`.
pub(super) fn check(argument: &str) -> Outcome {
    let peer: SocketAddr = argument.parse().map_err(|_| format!("{argument} is no ADDRESS:PORT"))?;
    network::set_up()?;
    let connection = connect(peer)?;
    let shared = Shared::default();
    let found = mounted(disk::DEFAULT, || work(&connection, &shared))?;
    // What is in this kernel's memory has gone with the mount.
    drop_caches()?;
    let records = shared.records.load(Ordering::Relaxed);
    mounted(disk::DEFAULT, || disk_log::check_all(records))?;
    Ok(format!("{} {found}", shared.words()))
}

fn connect(peer: SocketAddr) -> Result<TcpStream, String> {
    let deadline = Instant::now() + DEVICE_TIMEOUT;
    loop {
        match TcpStream::connect(peer) {
            Ok(connection) => return Ok(connection),
            Err(e) if Instant::now() >= deadline => return Err(format!("{peer}: {e}")),
            Err(_) => sleep(Duration::from_millis(100)),
        }
    }
}

/// Does everything until the host's stream ends, or something fails.
fn work(connection: &TcpStream, shared: &Shared) -> Outcome {
    let processors = std::thread::available_parallelism().map_err(|e| e.to_string())?.get();
    let latest = clock::Latest::default();
    let latest = &latest;
    scope(|scope| {
        let crew = Crew { scope, connection, shared };
        let mut workers = vec![
            crew.start("log".into(), move || disk_log::run(shared))?,
            crew.start("reads".into(), move || disk_reads::run(shared))?,
            crew.start("sender".into(), move || {
                let is_over = || shared.is_over();
                let sent = stream::send(connection, stream::OF_GUEST, STREAM_PAUSE, &shared.sent, is_over);
                sent.map(|_| String::new())
            })?,
            crew.start("news".into(), move || {
                tell(shared);
                Ok(String::new())
            })?,
        ];
        for processor in 0..processors {
            workers.push(crew.start_on(processor, "memory", move || memory::run(processor, shared))?);
            workers.push(crew.start_on(processor, "clock", move || clock::run(processor, latest, shared))?);
        }
        workers.push(crew.start("receiver".into(), move || {
            stream::receive(connection, stream::OF_HOST, &shared.received)?;
            shared.over.store(true, Ordering::Relaxed);
            Ok(String::new())
        })?);
        let ends = workers.into_iter().map(|(name, worker)| match worker.join() {
            Ok(end) => end.map_err(|why| format!("{name}: {why}")),
            Err(_) => Err(format!("{name}: panicked")),
        });
        let (found, failed): (Vec<_>, Vec<_>) = ends.partition(Result::is_ok);
        if failed.is_empty() {
            Ok(found.into_iter().flatten().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" "))
        } else {
            Err(failed.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("; "))
        }
    })
}

/// Whoever starts threads, each of which ends all others when it fails.
#[derive(Clone, Copy)]
struct Crew<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    connection: &'scope TcpStream,
    shared: &'scope Shared,
}

type Worker<'scope> = (String, ScopedJoinHandle<'scope, Outcome>);

impl<'scope> Crew<'scope, '_> {
    fn start(self, name: String, work: impl FnOnce() -> Outcome + Send + 'scope) -> Result<Worker<'scope>, String> {
        let work = move || work().inspect_err(|why| self.give_up(why));
        let worker = Builder::new().name(name.clone()).spawn_scoped(self.scope, work).map_err(tried(&name));
        Ok((name, worker.inspect_err(|why| self.give_up(why))?))
    }

    /// Has all threads end.
    fn give_up(self, why: &str) {
        // At once: the end that is waited for may not come any more.
        news("busy", &format!("gives up: {why}"));
        self.shared.over.store(true, Ordering::Relaxed);
        // Whoever waits for the host waits no longer.
        let _ = self.connection.shutdown(Shutdown::Both);
    }

    fn start_on(
        self,
        processor: usize,
        name: &str,
        work: impl FnOnce() -> Outcome + Send + 'scope,
    ) -> Result<Worker<'scope>, String> {
        self.start(format!("{name}{processor}"), move || {
            let mut alone = CpuSet::new();
            alone.set(processor);
            sched_setaffinity(None, &alone).map_err(tried("sched_setaffinity"))?;
            work()
        })
    }
}

/// Says how far it is, until it is over.
fn tell(shared: &Shared) {
    let mut next = Instant::now();
    while !shared.is_over() {
        if Instant::now() >= next {
            news("busy", &shared.words());
            next = Instant::now() + NEWS_PERIOD;
        }
        sleep(Duration::from_millis(50));
    }
}

/// Numbers that look random, the same in every run.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        // Knuth's MMIX.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit.max(1)
    }
}

/// Memory that direct I/O takes.
#[repr(C, align(4096))]
struct Aligned<const BYTES: usize>([u8; BYTES]);
