//! The server's side of the API socket: a thread a connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::vmm::{Farewell, Vmm};
use super::{Failure, MigrateRequest, Request, Response};
use crate::exit::ExitCode;
use crate::migration::cancel::Cancel;
use crate::migration::link::unix::{SocketFile, bind};
use crate::migration::progress::Progress;

/// The longest request, in bytes.
const MAX_REQUEST: u64 = 1 << 20;
/// Most connections at a time.
const MAX_CONNECTIONS: usize = 16;
/// How long a client may take to send its request or to read an answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(10);
/// Progress is sent this often at most.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// A listening API socket. Its file goes with it.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    _file: SocketFile,
    vmm: Arc<Vmm>,
    connections: Arc<AtomicUsize>,
}

impl Server {
    /// Listens on `path`, where nothing is yet.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn bind(path: &Path, vmm: Arc<Vmm>) -> io::Result<Self> {
        let (listener, file) = bind(path)?;
        Ok(Self { listener, _file: file, vmm, connections: Arc::default() })
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
            return refuse(&stream, "too many connections; try again when others have ended");
        }
        let vmm = Arc::clone(&self.vmm);
        let connections = Arc::clone(&self.connections);
        std::thread::Builder::new().name("api".into()).spawn(move || {
            if let Err(e) = serve(&stream, &vmm) {
                tracing::debug!("an API client has gone: {e}");
            }
            connections.fetch_sub(1, Ordering::SeqCst);
        })?;
        Ok(())
    }
}

fn refuse(stream: &UnixStream, text: &str) -> io::Result<()> {
    let failure = Failure { text: text.into(), exit_code: ExitCode::Failure as u8 };
    respond(stream, &Response::Error(failure))
}

fn serve(stream: &UnixStream, vmm: &Vmm) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_LIMIT))?;
    stream.set_write_timeout(Some(CLIENT_LIMIT))?;
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_REQUEST)).read_until(b'\n', &mut line)?;
    let request: Request = match serde_json::from_slice(&line) {
        Ok(request) => request,
        Err(e) => return refuse(stream, &format!("not a request: {e}")),
    };
    let farewell = match request {
        Request::Quit { .. } => Some(Farewell::Quit),
        Request::Migrate(MigrateRequest { stay: false, .. }) => Some(Farewell::Migrated),
        _ => None,
    };
    let cancel = Arc::new(Cancel::default());
    let mut shown = None;
    let mut observer = |progress: &Progress| {
        if shown.is_some_and(|(phase, at): (_, Instant)| phase == progress.phase && at.elapsed() < PROGRESS_EVERY) {
            return;
        }
        shown = Some((progress.phase, Instant::now()));
        // Who asked for the migration and has gone no longer wants it.
        if respond(stream, &Response::Progress(progress.clone())).is_err() {
            cancel.cancel();
        }
    };
    let result = vmm.handle(&request, &cancel, &mut observer);
    let farewell = farewell.filter(|_| result.is_ok());
    let responded = respond(
        stream,
        &match result {
            Ok(answer) => Response::Ok(answer),
            Err(e) => Response::Error(e.into()),
        },
    );
    // Only now: when the monitor ends the process does, and with it this thread.
    if let Some(farewell) = farewell {
        vmm.end(farewell);
    }
    responded
}

fn respond(mut stream: &UnixStream, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    stream.write_all(&line)
}
