//! `--vsock`, as `run` and `receive` have it.

use std::collections::BTreeMap;
use std::sync::Arc;

use clap::Args;
use command_line::End;

use crate::devices::table;
use crate::devices::virtio::vsock::{VsockConfig, VsockOptions, VsockSocket};
use crate::exit::ExitCode;
use crate::record::Name;

/// Sockets between the guest and the host.
#[derive(Debug, Args)]
pub(super) struct VsockArguments {
    /// Give the guest sockets to this host: its context id, and the Unix socket where programs of the host connect and say
    /// `CONNECT PORT`. Who listens at `PATH_PORT` is reached by the guest.
    #[arg(long, value_name = "cid=N,socket=PATH")]
    vsock: Option<VsockOptions>,
}

impl VsockArguments {
    /// What the guest sees.
    pub(super) fn config(&self) -> Option<VsockConfig> {
        self.vsock.as_ref().map(|options| options.config)
    }

    /// Makes the socket.
    ///
    /// # Errors
    /// When it cannot be.
    pub(super) fn open(&self) -> Result<BTreeMap<Name, Arc<VsockSocket>>, End> {
        let Some(options) = &self.vsock else { return Ok(BTreeMap::new()) };
        let id = Name::try_from(table::VSOCK).map_err(|e| End::new(ExitCode::Failure, e))?;
        let socket = options.open().map_err(|e| End::new(ExitCode::Failure, e))?;
        Ok(BTreeMap::from([(id, socket)]))
    }
}
