//! The side that sends. [`migrate`] reads like the script it is; each phase is a function in a file of its own.
//!
//! | to read about | open |
//! |---|---|
//! | pre-copy, phase by phase | `session.rs` |
//! | how pages get from guest RAM onto the wire | `lanes.rs` |
//! | when another round is worth its time | `rounds.rs` |
//! | what is owed and what has been delivered | `delivery.rs` |
//! | whether the guest runs, and whose it is | `guest.rs` |
//! | what is said to the destination and heard of it | `peer.rs` |
//! | the last pages, the state, who owns the guest | `switchover.rs` |
//! | post-copy | `postcopy/` |
//! | residency and swap activity here | `figures.rs` |

mod delivery;
mod error;
mod figures;
mod guest;
mod lanes;
mod peer;
mod postcopy;
mod rounds;
mod session;
mod switchover;

use std::sync::Arc;
use std::time::Duration;

pub use error::SourceError;
use memory_agent::ByteSize;
pub use postcopy::PostCopyControl;
use session::Session;

use super::SourceMachine;
use super::cancel::Cancel;
use super::link::Link;
use super::plan::ColdPolicy;
use super::progress::{Observer, Report};
use super::wire::{MigrationId, WireError};

/// How much post-copy sends a second that the guest does not wait for, unless somebody says otherwise.
pub const DEFAULT_COLD_RATE: ByteSize = ByteSize::mib(64);

/// When the guest is switched over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Switchover {
    /// Once so little is left that it is paused for a moment only.
    #[default]
    Converged,
    /// After one round: what the guest has written meanwhile comes by post-copy. For guests that write faster than the link carries.
    Now,
}

/// How to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What happens to cold pages.
    pub cold: ColdPolicy,
    /// How many bytes of cold pages may be resident at a time.
    pub window: ByteSize,
    /// How long the guest may be paused, by the estimate at the time it is stopped.
    pub downtime_limit: Duration,
    /// How many rounds to try before saying that the guest writes faster than the link carries.
    pub max_rounds: u32,
    /// When the guest is switched over.
    pub switchover: Switchover,
    /// How many bytes a second post-copy sends that the guest does not wait for; 0 for no limit.
    pub cold_rate: ByteSize,
}

impl Options {
    /// Whether pages may be left to post-copy.
    pub fn follows(&self) -> bool {
        self.cold == ColdPolicy::Lazy || self.switchover == Switchover::Now
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cold: ColdPolicy::Paced,
            window: ByteSize::mib(16),
            downtime_limit: Duration::from_millis(300),
            max_rounds: 50,
            switchover: Switchover::Converged,
            cold_rate: DEFAULT_COLD_RATE,
        }
    }
}

/// Migrates `machine` over `link`. Where pages may be left to post-copy, `post_copy` says how, and this returns when all have been sent. When
/// this fails, the guest runs here as it did before, with one exception:
/// [`SourceError::Unconfirmed`], after which it is paused here and may run there.
///
/// # Errors
/// What went wrong, as a sentence for people.
pub fn migrate(
    machine: &dyn SourceMachine,
    link: Link,
    options: &Options,
    control: Option<&Arc<PostCopyControl>>,
    cancel: &Cancel,
    observer: &mut dyn Observer,
) -> Result<Report, SourceError> {
    let id = match control {
        Some(control) => control.channels.migration(),
        None => MigrationId::new().map_err(WireError::from)?,
    };
    let _span = tracing::info_span!("migration", %id, side = "source").entered();
    let result = run(machine, link, id, options, control, cancel, observer);
    cancel.forget();
    result
}

fn run(
    machine: &dyn SourceMachine,
    link: Link,
    id: MigrationId,
    options: &Options,
    control: Option<&Arc<PostCopyControl>>,
    cancel: &Cancel,
    observer: &mut dyn Observer,
) -> Result<Report, SourceError> {
    // Giving up ends the connection, and whatever waits on it sees only that.
    let mut session = Session::negotiate(machine, link, id, options, control, cancel, observer)
        .map_err(|e| if cancel.is_cancelled() { SourceError::Cancelled } else { e })?;
    match session.copy().and_then(|()| session.switch_over()) {
        Ok(()) => session.finish(),
        Err(e) => Err(session.give_up(e)),
    }
}
