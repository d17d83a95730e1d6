//! The server's side of the API socket: a thread a connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::controller::Controller;
use super::failure::{Failure, FailureKind};
use super::migration::{Migration, News};
use super::{Answer, Request, Response};
use crate::host;
use crate::migration::link::unix::{SocketFile, bind};
use crate::migration::progress::Report;

/// The longest request, in bytes.
const MAX_REQUEST: u64 = 1 << 20;
/// Most connections at a time.
const MAX_CONNECTIONS: usize = 16;
/// How long a client may take to send its request or to read an answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(10);
/// How often to see whether a client has gone that waits for a migration which does not come on.
const LOOKED_AFTER_EVERY: Duration = Duration::from_secs(1);

/// A listening API socket. Its file goes with it.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    _file: SocketFile,
    controller: Arc<Controller>,
    connections: Arc<AtomicUsize>,
}

impl Server {
    /// Listens on `path`, where nothing is yet.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn bind(path: &Path, controller: Arc<Controller>) -> io::Result<Self> {
        let (listener, file) = bind(path)?;
        Ok(Self { listener, _file: file, controller, connections: Arc::default() })
    }

    /// The socket to wait on.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Takes one connection and serves it in a thread of its own.
    ///
    /// # Errors
    /// When the host refuses; the server goes on.
    pub fn accept(&self) -> io::Result<()> {
        let (stream, _) = self.listener.accept()?;
        if self.connections.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::SeqCst);
            return refuse(&stream, FailureKind::Busy, "too many connections; try again when others have ended");
        }
        let controller = Arc::clone(&self.controller);
        let connections = Arc::clone(&self.connections);
        let work = move || {
            if let Err(e) = serve(&stream, &controller) {
                tracing::debug!("an API client has gone: {e}");
            }
            connections.fetch_sub(1, Ordering::SeqCst);
        };
        let spawned = host::thread("api").and_then(|thread| thread.spawn(work));
        if spawned.is_err() {
            self.connections.fetch_sub(1, Ordering::SeqCst);
        }
        spawned.map(drop)
    }
}

fn refuse(stream: &UnixStream, kind: FailureKind, text: &str) -> io::Result<()> {
    respond(stream, &Response::Error(Failure::new(kind, text)))
}

fn serve(stream: &UnixStream, controller: &Arc<Controller>) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_LIMIT))?;
    stream.set_write_timeout(Some(CLIENT_LIMIT))?;
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_REQUEST)).read_until(b'\n', &mut line)?;
    let request: Request = match serde_json::from_slice(&line) {
        Ok(request) => request,
        Err(e) => return refuse(stream, FailureKind::Invalid, &format!("not a request: {e}")),
    };
    let _answering = controller.answering(&request);
    let answer = match controller.watched(&request) {
        Ok(Some((migration, seen))) => watch(stream, &migration, seen)?.map(Answer::Migrated),
        Ok(None) => controller.handle(&request).map_err(Failure::from),
        Err(e) => Err(e.into()),
    };
    respond(
        stream,
        &match answer {
            Ok(answer) => Response::Ok(answer),
            Err(failure) => Response::Error(failure),
        },
    )
}

/// Shows a migration's progress behind what has been `seen` until it ends, and gives how. It goes on when the client does not read or has gone.
fn watch(stream: &UnixStream, migration: &Migration, mut seen: u64) -> io::Result<Result<Report, Failure>> {
    loop {
        match migration.next(&mut seen, LOOKED_AFTER_EVERY) {
            News::Ended(outcome) => return Ok(outcome),
            News::Progress(progress) if is_ready(stream, PollFlags::OUT)? => {
                respond(stream, &Response::Progress(progress))?;
            }
            News::Progress(_) | News::Nothing => {
                if is_ready(stream, PollFlags::HUP)? {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
        }
    }
}

/// Whether a client's socket is so at this moment.
fn is_ready(stream: &UnixStream, flags: PollFlags) -> io::Result<bool> {
    let mut polled = [PollFd::new(stream, flags)];
    poll(&mut polled, Some(&Timespec::default()))?;
    Ok(polled[0].revents().intersects(flags))
}

fn respond(mut stream: &UnixStream, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::MigrationFailure;
    use crate::migration::progress::{Phase, Progress};

    fn progress(phase: Phase) -> Progress {
        Progress { phase, ..Progress::at_start(0) }
    }

    fn migration() -> Migration {
        Migration::new(1, "unix:/nowhere".parse().unwrap(), false, None)
    }

    fn cancelled() -> Failure {
        let reason = Some(MigrationFailure::Cancelled);
        Failure { kind: FailureKind::MigrationFailed, reason, text: "no".into() }
    }

    #[test]
    fn whoever_does_not_read_holds_nobody_up_and_hears_the_end() {
        let (_client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        while (&server).write(&[0; 4096]).is_ok() {}
        server.set_nonblocking(false).unwrap();
        let migration = migration();
        for phase in [Phase::Negotiating, Phase::Hot, Phase::Cold, Phase::Hot] {
            migration.show(&progress(phase));
        }
        migration.end(Err(cancelled()));
        assert_eq!(watch(&server, &migration, 0).unwrap(), Err(cancelled()));
    }

    #[test]
    fn whoever_reads_sees_progress() {
        let (client, server) = UnixStream::pair().unwrap();
        let migration = migration();
        migration.show(&progress(Phase::Hot));
        migration.end(Err(cancelled()));
        watch(&server, &migration, 0).unwrap().unwrap_err();
        drop(server);
        let lines: Vec<_> = BufReader::new(client).lines().map(Result::unwrap).collect();
        assert_eq!(lines.len(), 1);
        assert!(lines[0].starts_with(r#"{"progress":{"phase":"hot""#), "{lines:?}");
    }

    #[test]
    fn whoever_has_gone_is_not_waited_for() {
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert!(watch(&server, &migration(), 0).is_err());
    }
}
