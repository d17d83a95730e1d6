//! A proxy that stands between two hosts, understands frames, and does one wrong thing to one of them.

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::process::TIMEOUT;
use crate::stop::locked;
use crate::wire_frame::{Frame, Frames, HEADER};

/// Nobody is silent longer in any trial.
const IDLE: Duration = Duration::from_secs(50);

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source to the destination.
    There,
    /// From the destination to the source.
    Back,
}

/// Which of the frames of one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// By number, from 0.
    Nth(u32),
    /// The one before the machine's state.
    BeforeState,
}

/// What is done to the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The connection ends instead of it.
    CutBefore,
    /// The connection ends in its middle.
    CutInside,
    /// The connection is reset instead of it: the sides get an error, not an end.
    ResetBefore,
    /// One bit of its header is the other way round.
    FlipHeader,
    /// One bit of its payload is.
    FlipPayload,
    /// It comes twice.
    Repeat,
    /// It does not come, all that follows does.
    Drop,
    /// It does not come, nor anything more either way; the connection stays.
    HoldBefore,
    /// It comes, and nothing more either way; the connection stays.
    HoldAfter,
}

/// One wrong thing.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Direction of the frame.
    pub way: Way,
    /// Name of the frame.
    pub frame: &'static str,
    /// Which of them.
    pub which: Which,
    /// What is done to it.
    pub wrong: Wrong,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { way, frame, which, wrong } = self;
        write!(f, "{wrong:?} '{frame}' ({which:?}, {way:?})")
    }
}

#[derive(Debug, Default)]
struct Shared {
    struck: Mutex<bool>,
    changed: Condvar,
    /// Nothing is passed on any more.
    held: AtomicBool,
    /// The connection has ended.
    over: AtomicBool,
    /// Names of frames seen, each way.
    seen: Mutex<[Vec<&'static str>; 2]>,
    streams: Mutex<Vec<TcpStream>>,
    /// When frames to the destination have to be held back to keep to the rate.
    bytes_per_second: Option<u64>,
}

impl Shared {
    fn strike(&self) {
        *locked(&self.struck) = true;
        self.changed.notify_all();
    }

    fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    fn close(&self) {
        for stream in locked(&self.streams).drain(..) {
            // Fails when the other side is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn reset(&self) {
        for stream in locked(&self.streams).iter() {
            // Disconnecting sends a reset though others have the socket open and wait on it.
            let _ = rustix::net::connect_unspec(stream);
        }
        self.close();
    }
}

/// The proxy. Dropped, it ends its connections.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens, for `--to`.
    pub address: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Passes on whatever comes to the destination at `to`, with one fault.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn with_fault(to: &str, fault: Fault) -> Result<Self> {
        Self::start(to, Some(fault), None)
    }

    /// Passes on whatever comes, at so many bytes a second.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn with_rate(to: &str, bytes_per_second: u64) -> Result<Self> {
        Self::start(to, None, Some(bytes_per_second))
    }

    fn start(to: &str, fault: Option<Fault>, bytes_per_second: Option<u64>) -> Result<Self> {
        let to = to.strip_prefix("tcp:").context("the proxy speaks TCP")?.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("tcp:{}", listener.local_addr()?);
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared { bytes_per_second, ..Shared::default() });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                // Who connects to nobody sees the connection end.
                let _ = serve(&listener, &to, fault, &shared);
                shared.close();
                shared.over.store(true, Ordering::SeqCst);
                shared.changed.notify_all();
            })
        };
        Ok(Self { address, shared, thread: Some(thread) })
    }

    /// Waits until the fault has been done; `false` when the connection ended before its frame came.
    ///
    /// # Errors
    /// When neither happens.
    pub fn struck(&self) -> Result<bool> {
        let deadline = Instant::now() + TIMEOUT;
        let mut struck = locked(&self.shared.struck);
        while !*struck && !self.shared.over.load(Ordering::SeqCst) {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "the frame for the fault never came; seen: {}", self.summary());
            // Looks up now and then: the end is not told under this lock.
            let look = left.min(Duration::from_millis(50));
            struck = self.shared.changed.wait_timeout(struck, look).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(*struck)
    }

    /// Waits until the fault has been done.
    ///
    /// # Errors
    /// When the frame did not come.
    pub fn wait_struck(&self) -> Result<()> {
        ensure!(self.struck()?, "the migration was over before the frame for the fault came; seen: {}", self.summary());
        Ok(())
    }

    /// The frames seen, each way, as names and numbers.
    fn summary(&self) -> String {
        let mut text = String::new();
        for (way, seen) in ["there", "back"].into_iter().zip(self.seen()) {
            let runs = seen.chunk_by(|a, b| a == b).map(|run| format!("{} x{}", run[0], run.len()));
            text += &format!("{way}: {}; ", runs.collect::<Vec<_>>().join(", "));
        }
        text
    }

    /// Names of frames that came: to the destination, and back.
    pub fn seen(&self) -> [Vec<&'static str>; 2] {
        locked(&self.shared.seen).clone()
    }

    /// Ends the connections.
    pub fn cut(&self) {
        self.shared.close();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // What was held back has been read here, which a host that died would not have done: its kernel resets.
        if self.shared.held.swap(true, Ordering::SeqCst) {
            self.shared.reset();
        } else {
            self.shared.close();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, to: &str, fault: Option<Fault>, shared: &Arc<Shared>) -> Result<()> {
    let deadline = Instant::now() + IDLE;
    let source = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                ensure!(Instant::now() < deadline && !shared.held.load(Ordering::SeqCst), "nobody came");
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(e.into()),
        }
    };
    source.set_nonblocking(false)?;
    let destination = TcpStream::connect(to)?;
    for stream in [&source, &destination] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(IDLE))?;
        locked(&shared.streams).push(stream.try_clone()?);
    }
    let there = Pump { way: Way::There, fault, shared: Arc::clone(shared), count: 0, waiting: None };
    let back = Pump { way: Way::Back, fault, shared: Arc::clone(shared), count: 0, waiting: None };
    let (source2, destination2) = (source.try_clone()?, destination.try_clone()?);
    let back = std::thread::spawn(move || back.run(&destination2, &source2));
    there.run(&source, &destination);
    let _ = back.join();
    Ok(())
}

struct Pump {
    way: Way,
    fault: Option<Fault>,
    shared: Arc<Shared>,
    /// Frames of the fault's name so far.
    count: u32,
    /// A frame that may turn out to be the one before the state.
    waiting: Option<Frame>,
}

/// The stream goes no further.
struct Over;

impl Pump {
    fn run(mut self, from: &TcpStream, to: &TcpStream) {
        let mut frames = Frames::new(from);
        while let Ok(frame) = frames.next_frame() {
            if self.shared.held.load(Ordering::SeqCst) {
                // Read, so that nobody waits for room, and kept.
                continue;
            }
            locked(&self.shared.seen)[self.way as usize].push(frame.name);
            if self.take(frame, to).is_err() {
                break;
            }
        }
        if let Some(frame) = self.waiting.take() {
            let _ = self.pass(&frame, to);
        }
        if !self.shared.held.load(Ordering::SeqCst) {
            // One side has ended; what is on its way back still arrives.
            let _ = to.shutdown(Shutdown::Write);
        }
    }

    fn take(&mut self, frame: Frame, to: &TcpStream) -> Result<(), Over> {
        let Some(fault) = self.fault.filter(|fault| fault.way == self.way) else { return self.pass(&frame, to) };
        if fault.which == Which::BeforeState {
            if let Some(waiting) = self.waiting.take() {
                if frame.name == "state" {
                    self.strike(&waiting, fault.wrong, to)?;
                } else {
                    self.pass(&waiting, to)?;
                }
            }
            if frame.name == fault.frame {
                self.waiting = Some(frame);
                return Ok(());
            }
        } else if frame.name == fault.frame {
            let now = Which::Nth(self.count) == fault.which;
            self.count += 1;
            if now {
                return self.strike(&frame, fault.wrong, to);
            }
        }
        self.pass(&frame, to)
    }

    fn pass(&self, frame: &Frame, to: &TcpStream) -> Result<(), Over> {
        if let Some(rate) = self.shared.bytes_per_second.filter(|_| self.way == Way::There) {
            std::thread::sleep(Duration::from_secs_f64(frame.bytes.len() as f64 / rate as f64));
        }
        self.write(&frame.bytes, to)
    }

    fn write(&self, bytes: &[u8], mut to: &TcpStream) -> Result<(), Over> {
        to.write_all(bytes).map_err(|_| Over)
    }

    fn strike(&self, frame: &Frame, wrong: Wrong, to: &TcpStream) -> Result<(), Over> {
        let flipped = |at: usize| {
            let mut bytes = frame.bytes.clone();
            bytes[at] ^= 0x10;
            bytes
        };
        if matches!(wrong, Wrong::HoldBefore | Wrong::HoldAfter) {
            // Before the frame leaves, so that no answer to it can pass.
            self.shared.hold();
        }
        let done = match wrong {
            Wrong::CutBefore => Err(Over),
            Wrong::CutInside => self.write(&frame.bytes[..frame.bytes.len() / 2], to).and(Err(Over)),
            Wrong::ResetBefore => Err(Over),
            // In the sequence number.
            Wrong::FlipHeader => self.write(&flipped(8), to),
            Wrong::FlipPayload => self.write(&flipped((HEADER + frame.bytes.len()) / 2), to),
            Wrong::Repeat => self.write(&frame.bytes, to).and_then(|()| self.write(&frame.bytes, to)),
            Wrong::Drop | Wrong::HoldBefore => Ok(()),
            Wrong::HoldAfter => self.write(&frame.bytes, to),
        };
        match wrong {
            Wrong::ResetBefore => self.shared.reset(),
            _ if done.is_err() => self.shared.close(),
            _ => {}
        }
        self.shared.strike();
        done
    }
}
