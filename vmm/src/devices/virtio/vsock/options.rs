//! How a user asks for sockets: `--vsock cid=N,socket=PATH`.

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::socket::VsockSocket;
use super::{CIDS, VsockConfig};
use crate::key_value::{KeyValueError, KeyValues};

/// Why there can be no such sockets.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// What is written makes no sense.
    #[error(transparent)]
    Syntax(#[from] KeyValueError),
    /// No such context id.
    #[error("no guest can have the context id {0}: 3 to 4294967294")]
    Cid(u32),
    /// No socket there.
    #[error("no socket can be made at {path}: {cause}; choose a path where nothing is, in a directory of this user's", path = .path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
}

/// Sockets as they are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockOptions {
    /// What the guest sees.
    pub config: VsockConfig,
    /// Where programs of the host connect.
    pub socket: PathBuf,
}

impl FromStr for VsockOptions {
    type Err = VsockError;

    fn from_str(text: &str) -> Result<Self, VsockError> {
        let values = KeyValues::parse(text, &["cid", "socket"])?;
        let cid = values.parsed("cid")?.ok_or(KeyValueError::Missing("cid"))?;
        if !CIDS.contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        Ok(Self { config: VsockConfig { cid }, socket: values.required("socket")?.into() })
    }
}

impl VsockOptions {
    /// Makes the socket.
    ///
    /// # Errors
    /// When something is at its path, or the host refuses.
    pub fn open(&self) -> Result<Arc<VsockSocket>, VsockError> {
        let refused = |cause| VsockError::Bind { path: self.socket.clone(), cause };
        VsockSocket::bind(&self.socket).map(Arc::new).map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        let options: VsockOptions = "cid=3,socket=/tmp/a".parse().unwrap();
        assert_eq!((options.config.cid, options.socket), (3, PathBuf::from("/tmp/a")));
        for (text, words) in [
            ("socket=/a", "cid=…"),
            ("cid=3", "socket=…"),
            ("cid=2,socket=/a", "3 to"),
            ("cid=4294967295,socket=/a", "3 to"),
            ("cid=x,socket=/a", "cid=x"),
        ] {
            let why = text.parse::<VsockOptions>().unwrap_err().to_string();
            assert!(why.contains(words), "{text}: {why}");
        }
    }
}
