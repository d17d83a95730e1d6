//! The QEMU Machine Protocol: commands, answers and events, one JSON object a line.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::process::PATIENCE;
use crate::stop;

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
        let deadline = Instant::now() + PATIENCE;
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
                bail!("QEMU refuses {command}: {error}");
            }
            match message.get_mut("return") {
                Some(result) => return Ok(result.take()),
                None => self.events.push(message),
            }
        }
    }

    /// Waits for an event that `wanted` takes.
    pub(crate) fn wait_for<T>(&mut self, wanted: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for event in std::mem::take(&mut self.events) {
                if let Some(found) = wanted(&event) {
                    return Ok(found);
                }
            }
            ensure!(Instant::now() < deadline, "QEMU did not say what it should within {PATIENCE:?}");
            let event = self.message()?;
            self.events.push(event);
        }
    }

    fn message(&mut self) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
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
            ensure!(Instant::now() < deadline, "QEMU said nothing within {PATIENCE:?}");
        }
    }
}
