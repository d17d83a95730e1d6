//! Why a migration did not happen.

use crate::machine::MachineError;
use crate::migration::channels::JoinError;
use crate::migration::link::LinkError;
use crate::migration::wire::{Refusal, RefusalReason, WireError};
use crate::ram::RamError;

/// Why a migration did not happen, from the source's side.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The destination does not take this machine or could not go on.
    #[error("the destination refuses: {}", .0.text)]
    Refused(Refusal),
    /// The connection or what came over it.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Somebody gave it up.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The destination's program has no post-copy.
    #[error(
        "the destination's program cannot take pages left to post-copy; use the same release on both hosts, or have all pages sent before switchover"
    )]
    NoPostCopy,
    /// No channel for the pages left to post-copy.
    #[error("no second connection to the destination, for pages that the guest waits for: {0}")]
    Channel(JoinError),
    /// The guest writes faster than the link carries.
    #[error(
        "the migration does not converge: after {rounds} rounds the guest still writes {dirty_mib:.0} MiB/s and the connection carries {link_mib:.0} MiB/s, \
         so that it would be paused for {downtime_ms} ms; switch over now, with the rest by post-copy, allow a longer downtime, or let the guest write less"
    )]
    NotConverging {
        /// Rounds tried.
        rounds: u32,
        /// What the guest writes, MiB a second.
        dirty_mib: f64,
        /// What the connection carries, MiB a second.
        link_mib: f64,
        /// How long the guest would be paused, milliseconds.
        downtime_ms: u64,
    },
    /// The guest was handed over and the destination never said that it runs.
    #[error(
        "the guest was handed over, but the destination did not confirm that it runs there ({0}); it stays paused here. \
         Look at the destination: if the guest does not run there, resume it here by force; never let both run"
    )]
    Unconfirmed(WireError),
}

impl SourceError {
    /// Why the destination refused, if it did.
    pub fn refusal(&self) -> Option<RefusalReason> {
        match self {
            Self::Refused(refusal) => Some(refusal.reason),
            _ => None,
        }
    }
}
