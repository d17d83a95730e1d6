//! Connections between two hosts: an address, and a stream of bytes both ways.
//!
//! | scheme | file |
//! |---|---|
//! | `tcp:HOST:PORT` | `tcp.rs` |
//! | `unix:PATH` | `unix.rs` |

mod tcp;
pub(crate) mod unix;

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use rustix::net::RecvFlags;

/// How long a side waits for the other before it takes it for dead.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// How long a connection may take to come about.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Where a migration goes to or comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host (name or address) and port.
    Tcp(String),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// Why a text is not an address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not an address: write tcp:HOST:PORT or unix:PATH")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || AddressError(text.into());
        match text.split_once(':') {
            Some(("tcp", rest)) => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
                port.parse::<u16>().map_err(|_| wrong())?;
                if host.is_empty() { Err(wrong()) } else { Ok(Self::Tcp(rest.into())) }
            }
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => write!(f, "tcp:{host_port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers.
    #[error("nobody answers at {address}: {source}; is `thermocline receive --listen {address}` running there?")]
    Connect {
        /// Where.
        address: Address,
        /// What the host said.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address, or end what uses it")]
    Listen {
        /// Where.
        address: Address,
        /// What the host said.
        source: io::Error,
    },
    /// Waiting for a connection failed.
    #[error("waiting for a connection failed: {0}")]
    Accept(io::Error),
    /// The connection's options could not be set.
    #[error("the connection could not be set up: {0}")]
    Setup(io::Error),
}

/// A connection.
#[derive(Debug)]
pub enum Link {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
}

impl Link {
    /// Connects.
    ///
    /// # Errors
    /// When nobody answers in time.
    pub fn connect(address: &Address) -> Result<Self, LinkError> {
        let link = match address {
            Address::Tcp(host_port) => tcp::connect(host_port, CONNECT_LIMIT).map(Self::Tcp),
            Address::Unix(path) => UnixStream::connect(path).map(Self::Unix),
        }
        .map_err(|source| LinkError::Connect { address: address.clone(), source })?;
        link.set_up().map_err(LinkError::Setup)?;
        Ok(link)
    }

    /// A second handle of the same connection, to read with while the first writes.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    /// Ends one or both directions.
    pub fn shutdown(&self, how: Shutdown) {
        // Fails when the connection is gone, which is what was wanted.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Unix(stream) => stream.shutdown(how),
        };
    }

    /// Sets how long a read may wait.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn set_read_limit(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(Some(limit)),
            Self::Unix(stream) => stream.set_read_timeout(Some(limit)),
        }
    }

    /// Lets reads wait for as long as the connection lives: that the other side's host is gone is noticed all the same.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn wait_for_ever(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(None),
            Self::Unix(stream) => stream.set_read_timeout(None),
        }
    }

    /// Reads what has come, and waits for nothing: `WouldBlock` when that is nothing.
    ///
    /// # Errors
    /// When the connection has failed.
    pub fn read_now(&self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(self, bytes, RecvFlags::DONTWAIT)?.0)
    }

    fn set_up(&self) -> io::Result<()> {
        self.set_read_limit(SILENCE_LIMIT)?;
        match self {
            Self::Tcp(stream) => {
                stream.set_write_timeout(Some(SILENCE_LIMIT))?;
                tcp::set_up(stream, SILENCE_LIMIT)
            }
            Self::Unix(stream) => {
                stream.set_write_timeout(Some(SILENCE_LIMIT))?;
                unix::set_up(stream)
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for Link {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(bytes),
            Self::Unix(stream) => stream.read(bytes),
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write_vectored(slices),
            Self::Unix(stream) => stream.write_vectored(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for connections.
#[derive(Debug)]
pub enum Listener {
    /// On TCP.
    Tcp(TcpListener),
    /// On a Unix socket, whose file goes with it.
    Unix(UnixListener, unix::SocketFile),
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// When the address is taken or not ours.
    pub fn bind(address: &Address) -> Result<Self, LinkError> {
        match address {
            Address::Tcp(host_port) => TcpListener::bind(host_port.as_str()).map(Self::Tcp),
            Address::Unix(path) => unix::bind(path).map(|(listener, file)| Self::Unix(listener, file)),
        }
        .map_err(|source| LinkError::Listen { address: address.clone(), source })
    }

    /// Where it listens: with port 0, the port that was chosen.
    pub fn address(&self) -> Option<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok().map(|a| Address::Tcp(a.to_string())),
            Self::Unix(_, file) => Some(Address::Unix(file.path().to_path_buf())),
        }
    }

    /// Takes one connection.
    ///
    /// # Errors
    /// When the host fails.
    pub fn accept(&self) -> Result<Link, LinkError> {
        let link = match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Link::Tcp(stream)),
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Link::Unix(stream)),
        }
        .map_err(LinkError::Accept)?;
        link.set_up().map_err(LinkError::Setup)?;
        Ok(link)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_written() {
        for text in ["tcp:127.0.0.1:4000", "tcp:host.example:1", "tcp:[::1]:4000", "unix:/run/x.sock"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["", "127.0.0.1:4000", "tcp:host", "tcp::4000", "tcp:host:99999", "unix:", "rdma:host:1"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
