//! Connections between two hosts: an address, and a stream of bytes both ways.
//!
//! | scheme | file |
//! |---|---|
//! | `tcp:HOST:PORT` | `tcp.rs` |
//! | `unix:PATH` | `unix.rs` |
//!
//! What both are once they have come about is in `connection.rs`.

mod connection;
mod tcp;
pub(crate) mod unix;

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

pub use connection::Link;

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
    #[error("nobody answers at {address}: {cause}; is `thermocline receive --listen {address}` running there?")]
    Connect {
        /// Where.
        address: Address,
        /// What the host said.
        cause: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {cause}; choose another address, or end what uses it")]
    Listen {
        /// Where.
        address: Address,
        /// What the host said.
        cause: io::Error,
    },
    /// Waiting for a connection failed.
    #[error("waiting for a connection failed: {0}")]
    Accept(io::Error),
    /// The connection's options could not be set.
    #[error("the connection could not be set up: {0}")]
    Setup(io::Error),
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
        .map_err(|cause| LinkError::Listen { address: address.clone(), cause })
    }

    /// Where it listens: with port 0, the port that was chosen.
    pub fn address(&self) -> Option<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok().map(|a| Address::Tcp(a.to_string())),
            Self::Unix(_, file) => Some(Address::Unix(file.path().to_path_buf())),
        }
    }

    /// Takes one connection; also says who it comes from, for people.
    ///
    /// # Errors
    /// When the host fails.
    pub fn accept(&self) -> Result<(Link, String), LinkError> {
        let (link, from) = match self {
            Self::Tcp(listener) => {
                let (stream, from) = listener.accept().map_err(LinkError::Accept)?;
                (Link::of_tcp(stream), format!("tcp:{from}"))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().map_err(LinkError::Accept)?;
                let from = unix::describe_peer(&stream);
                (Link::of_unix(stream), from)
            }
        };
        Ok((link.map_err(LinkError::Setup)?, from))
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
