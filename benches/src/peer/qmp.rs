//! The QEMU Machine Protocol: commands, answers and events, one JSON object a line.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::process::TIMEOUT;
use crate::stop;

/// QEMU does not do what it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    what: String,
    why: String,
}

impl Refused {
    pub(super) fn new(what: &str, why: impl Into<String>) -> Self {
        Self { what: what.to_owned(), why: why.into() }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QEMU refuses {}: {}", self.what, self.why)
    }
}

impl std::error::Error for Refused {}

/// A connection to one QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// What came of a line that is not whole yet.
    partial: Vec<u8>,
    /// Events that came while an answer was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects, waiting for the socket to appear.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + TIMEOUT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => stop::sleep(Duration::from_millis(2))?,
                Err(e) => return Err(e).context("QEMU's control socket"),
            }
        };
        stream.set_read_timeout(Some(stop::LOOK_EVERY))?;
        let mut qmp = Self { stream: BufReader::new(stream), partial: Vec::new(), events: Vec::new() };
        qmp.message()?;
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Sends a command and gives what it returns.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.stream.get_mut().write_all(line.as_bytes()).context("QEMU has gone")?;
        loop {
            let mut message = self.message()?;
            if let Some(error) = message.get("error") {
                return Err(Refused::new(command, error.to_string()).into());
            }
            match message.get_mut("return") {
                Some(result) => return Ok(result.take()),
                None => self.events.push(message),
            }
        }
    }

    /// Waits for an event that `wanted` takes.
    pub(crate) fn wait_for<T>(&mut self, wanted: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let found = self.events.iter().enumerate().find_map(|(index, event)| Some((index, wanted(event)?)));
            if let Some((index, found)) = found {
                self.events.drain(..=index);
                return Ok(found);
            }
            self.events.clear();
            ensure!(Instant::now() < deadline, "QEMU did not say what it should within {TIMEOUT:?}");
            let event = self.message()?;
            self.events.push(event);
        }
    }

    fn message(&mut self) -> Result<Value> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            stop::check()?;
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("QEMU has ended"),
                Ok(_) => {
                    let line = std::mem::take(&mut self.partial);
                    return serde_json::from_slice(&line).context("what QEMU says makes no sense");
                }
                // What was read so far is in `partial`.
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e).context("QEMU's control socket"),
            }
            ensure!(Instant::now() < deadline, "QEMU said nothing within {TIMEOUT:?}");
        }
    }
}
