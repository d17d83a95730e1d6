//! The client's side of the API socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::{Answer, Failure, Request, Response};
use crate::migration::progress::Progress;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no answer at {path}: {cause}; is a thermocline running with this API socket?", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
    /// The monitor went away.
    #[error("the monitor ended before it answered")]
    Gone,
    /// What came is no answer.
    #[error("the monitor's answer makes no sense: {0}")]
    Answer(serde_json::Error),
    /// The connection failed.
    #[error("the connection to the monitor failed: {0}")]
    Io(io::Error),
    /// The monitor says no.
    #[error("{}", .0.text)]
    Failed(Failure),
}

/// Asks the monitor at `path` and waits for its answer.
///
/// # Errors
/// When there is none, or it is no.
pub fn ask(path: &Path, request: &Request, progress: impl FnMut(&Progress)) -> Result<Answer, ClientError> {
    let stream = UnixStream::connect(path).map_err(|cause| ClientError::Connect { path: path.into(), cause })?;
    ask_over(stream, request, progress)
}

fn ask_over(
    mut stream: UnixStream,
    request: &Request,
    mut progress: impl FnMut(&Progress),
) -> Result<Answer, ClientError> {
    let mut line = serde_json::to_vec(request).map_err(ClientError::Answer)?;
    line.push(b'\n');
    match stream.write_all(&line) {
        // Whoever turns clients away says why and closes, and may do so before it was asked anything.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.map_err(ClientError::Io)?,
    }
    for line in BufReader::new(stream).lines() {
        match serde_json::from_str(&line.map_err(ClientError::Io)?).map_err(ClientError::Answer)? {
            Response::Progress(p) => progress(&p),
            Response::Ok(answer) => return Ok(answer),
            Response::Error(failure) => return Err(ClientError::Failed(failure)),
        }
    }
    Err(ClientError::Gone)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::FailureKind;

    #[test]
    fn who_is_turned_away_before_asking_hears_why() {
        let (client, mut monitor) = UnixStream::pair().unwrap();
        let failure = Failure::new(FailureKind::Busy, "too many");
        serde_json::to_writer(&mut monitor, &Response::Error(failure)).unwrap();
        monitor.write_all(b"\n").unwrap();
        drop(monitor);
        let error = ask_over(client, &Request::Status {}, |_| {}).unwrap_err();
        assert!(matches!(&error, ClientError::Failed(failure) if failure.text == "too many"), "{error}");
        let (client, monitor) = UnixStream::pair().unwrap();
        drop(monitor);
        assert!(matches!(ask_over(client, &Request::Status {}, |_| {}), Err(ClientError::Gone)));
    }
}
