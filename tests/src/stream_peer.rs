//! The host's end of the stream that a busy Linux guest sends and receives over TCP, byte by byte checked.

use std::io::ErrorKind;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use linux_guest::stream::{OF_GUEST, OF_HOST, receive, send};

use crate::linux::BOOT_TIMEOUT;

/// Between two frames.
const PAUSE: Duration = Duration::from_millis(5);
/// The guest sends all the time: silence that is longer than any of its moves is an end.
const SILENCE: Duration = Duration::from_secs(120);

/// Bytes of both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    /// From the guest.
    pub received: u64,
    /// To the guest.
    pub sent: u64,
}

#[derive(Debug, Default)]
struct Shared {
    over: AtomicBool,
    received: AtomicU64,
    sent: AtomicU64,
}

/// A thread that waits for the guest's connection and then sends and receives.
#[derive(Debug)]
pub struct StreamPeer {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<Bytes>>,
}

impl StreamPeer {
    /// Listens at this address where `enter` takes a thread.
    ///
    /// # Errors
    /// When that cannot be, or somebody listens there.
    pub fn listen(address: SocketAddr, enter: impl FnOnce() -> Result<()> + Send) -> Result<Self> {
        // In a thread of its own, which stays where it has gone. Sockets stay where they were made.
        let listener = std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                enter()?;
                TcpListener::bind(address).with_context(|| address.to_string())
            });
            made.join().map_err(|_| anyhow!("the thread that listens panicked"))?
        })?;
        listener.set_nonblocking(true)?;
        let shared = Arc::<Shared>::default();
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("stream".into()).spawn(move || run(&listener, &for_thread))?;
        Ok(Self { shared, thread })
    }

    /// What has come and gone so far.
    pub fn so_far(&self) -> Bytes {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Bytes { received: of(&self.shared.received), sent: of(&self.shared.sent) }
    }

    /// Whether it has ended, which it does not by itself while all is well.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends the stream to the guest, which ends its own; all bytes of both.
    ///
    /// # Errors
    /// What was wrong with a byte of the guest's, or with the connection.
    pub fn end(self) -> Result<Bytes> {
        self.shared.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the stream's thread panicked"))?
    }
}

fn run(listener: &TcpListener, shared: &Shared) -> Result<Bytes> {
    let connection = accept(listener, shared)?;
    connection.set_nonblocking(false)?;
    connection.set_read_timeout(Some(SILENCE))?;
    connection.set_write_timeout(Some(SILENCE))?;
    let connection = &connection;
    std::thread::scope(|scope| {
        let is_over = || shared.over.load(Ordering::Relaxed);
        let sender = scope.spawn(move || send(connection, OF_HOST, PAUSE, &shared.sent, is_over));
        let received = receive(connection, OF_GUEST, &shared.received);
        if received.is_err() {
            shared.over.store(true, Ordering::Relaxed);
            // Whoever sends waits no longer.
            let _ = connection.shutdown(Shutdown::Both);
        }
        let sent = sender.join().map_err(|_| anyhow!("the stream's sender panicked"))?;
        let received = received.map_err(|why| anyhow!("the guest's stream: {why}"))?;
        Ok(Bytes { received, sent: sent.map_err(|why| anyhow!("the stream to the guest: {why}"))? })
    })
}

/// The first connection.
fn accept(listener: &TcpListener, shared: &Shared) -> Result<TcpStream> {
    let deadline = Instant::now() + BOOT_TIMEOUT;
    loop {
        match listener.accept() {
            Ok((connection, _)) => return Ok(connection),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e).context("nobody can connect"),
        }
        let is_over = shared.over.load(Ordering::Relaxed);
        ensure!(!is_over && Instant::now() < deadline, "the guest has not connected");
        sleep(Duration::from_millis(20));
    }
}
