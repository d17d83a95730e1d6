//! The host's side: a Unix socket where programs of the host ask for a port of the guest, and the paths of those that the guest may
//! ask for, as with Firecracker (docs/vsock.md) and Cloud Hypervisor.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

/// Most bytes of what a program says first, which is `CONNECT 4294967295` and the end of a line.
const MOST_GREETING: usize = 32;

/// A socket where programs of the host connect. Its file goes with it.
#[derive(Debug)]
pub struct VsockSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl VsockSocket {
    /// Listens at this path.
    ///
    /// # Errors
    /// When something is there, or the host refuses.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let socket = Self { listener, path: path.into() };
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Connects to whoever listens for the host's port of this number: the path, an underscore, and the number.
    ///
    /// # Errors
    /// When nobody does, or has as many as can wait.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(PathBuf::from(path))?)?;
        Ok(socket.into())
    }
}

impl Drop for VsockSocket {
    fn drop(&mut self) {
        // Somebody else may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What a program that has connected has said so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// Not all of it.
    Partly,
    /// It asks for this port of the guest's.
    Connect(u32),
    /// Something else, or it has gone.
    Nonsense,
}

/// Reads what a program says first, and nothing of what it says then.
pub(super) fn greeting(stream: &UnixStream) -> Greeting {
    let mut bytes = [0; MOST_GREETING];
    let seen = match rustix::net::recv(stream, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((count, _)) if count > 0 => &bytes[..count],
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Greeting::Partly,
        _ => return Greeting::Nonsense,
    };
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        let may_go_on = seen.len() < MOST_GREETING && is_beginning(seen);
        return if may_go_on { Greeting::Partly } else { Greeting::Nonsense };
    };
    let port = std::str::from_utf8(&seen[..end]).ok().and_then(|line| line.strip_prefix("CONNECT ")?.parse().ok());
    let mut line = [0; MOST_GREETING];
    // As much as has been seen is there.
    let taken = rustix::net::recv(stream, &mut line[..=end], RecvFlags::DONTWAIT);
    match port {
        Some(port) if taken.is_ok_and(|(count, _)| count == end + 1) => Greeting::Connect(port),
        _ => Greeting::Nonsense,
    }
}

/// Whether it can become something that makes sense.
fn is_beginning(seen: &[u8]) -> bool {
    let word = b"CONNECT ";
    let common = seen.len().min(word.len());
    seen[..common] == word[..common]
}
