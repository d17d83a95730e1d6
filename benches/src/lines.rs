//! Lines from a pipe, each with the moment its first byte came.

use std::io::Read;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::stop;

/// A line without its end.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    /// When its first byte was read.
    pub(crate) at: Instant,
    /// The line.
    pub(crate) text: String,
}

/// What a process writes. Read all the time, so that the process never waits for its reader.
#[derive(Debug)]
pub(crate) struct Lines(Receiver<Said>);

impl Lines {
    /// Reads `from` to its end, in a thread of its own.
    pub(crate) fn of(mut from: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            let mut line: Option<(Instant, Vec<u8>)> = None;
            // An error is an end too: the other side has gone.
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                let now = Instant::now();
                for byte in &buffer[..length] {
                    let (at, mut bytes) = line.take().unwrap_or((now, Vec::new()));
                    if *byte != b'\n' {
                        bytes.push(*byte);
                        line = Some((at, bytes));
                        continue;
                    }
                    let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                    if sender.send(Said { at, text }).is_err() {
                        return;
                    }
                }
            }
        });
        Self(receiver)
    }

    /// The next line; `None` when there is no more.
    ///
    /// # Errors
    /// When none comes within `limit`, or somebody wants an end.
    pub(crate) fn next(&self, limit: Duration) -> Result<Option<Said>> {
        let deadline = Instant::now() + limit;
        loop {
            stop::check()?;
            match self.0.recv_timeout(stop::LOOK_EVERY) {
                Ok(said) => return Ok(Some(said)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => bail!("nothing said within {limit:?}"),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Takes what is there, without waiting.
    pub(crate) fn drain(&self) -> impl Iterator<Item = Said> + '_ {
        self.0.try_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_and_the_end_is_told() {
        let lines = Lines::of(&b"one\r\ntwo\nhalf"[..]);
        let next = || lines.next(Duration::from_secs(10)).unwrap().map(|said| said.text);
        assert_eq!([next(), next(), next()], [Some("one".into()), Some("two".into()), None]);
    }
}
