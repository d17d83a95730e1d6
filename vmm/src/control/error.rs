//! Why something was not done.

use memory_agent::ByteSize;

use super::MAX_CELLS;
use super::failure::{Failure, FailureKind, MigrationFailure};
use crate::dump::DumpError;
use crate::machine::MachineError;
use crate::migration::channels::JoinError;
use crate::migration::link::{AddressError, LinkError};
use crate::migration::source::SourceError;
use crate::ram::RamError;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// There is no guest yet.
    #[error("no guest has arrived here yet")]
    NoGuest,
    /// There is one already.
    #[error("there is a guest here already")]
    HasGuest,
    /// The monitor ends.
    #[error("this monitor is about to end")]
    Ending,
    /// A migration is under way.
    #[error("a migration is under way; wait for it, or end it with `cancel-migration`")]
    Migrating,
    /// No migration is under way.
    #[error("no migration is under way")]
    NotMigrating,
    /// There has been no migration, or not this one.
    #[error("there has been no such migration")]
    NoMigration,
    /// The guest may run elsewhere.
    #[error(
        "the guest was handed over and may run at the destination; resume it by force if you know that it does not"
    )]
    HandedOver,
    /// Something that only one host may have is had elsewhere.
    #[error("the guest runs elsewhere, or is still held there: {0}; end it there first")]
    HadElsewhere(MachineError),
    /// Pages are only here.
    #[error(
        "the guest runs elsewhere, and {0} pages that it may need are only here; reconnect if the connection is gone, or quit by force to give them and with them the guest up"
    )]
    OnlyHere(u64),
    /// The machine has no power button.
    #[error(
        "the machine has no power button, as it was made by an older program; ask its guest to shut down another way"
    )]
    NoPowerButton,
    /// The machine has no balloon.
    #[error("the machine has no balloon; start it with one to have memory given back")]
    NoBalloon,
    /// More than all of its memory.
    #[error("a balloon of {asked} is more than the machine's memory, {memory}")]
    BalloonSize {
        /// What was asked for.
        asked: ByteSize,
        /// What there is.
        memory: ByteSize,
    },
    /// Not all of the guest's memory is here.
    #[error(
        "{0} pages of the guest's memory are still to come from where it was; wait until the status shows no `post_copy`"
    )]
    StillComing(u64),
    /// Nothing is outstanding.
    #[error("no pages are on their way that a connection could be made for")]
    NothingFollows,
    /// No way given.
    #[error("say where the other side listens, or where to listen for it, and not both")]
    NoWay,
    /// The other side cannot be reached.
    #[error("no new connection: {0}")]
    Join(JoinError),
    /// The guest could not be kept.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// The address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] LinkError),
    /// The host gives no random bytes or no threads.
    #[error("the host refuses: {0}")]
    Host(std::io::Error),
    /// Its memory has been given back.
    #[error("the guest runs elsewhere, and its memory has been given back to this host: it can never run here again")]
    Hollow,
    /// The address to migrate to is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Nobody has a map.
    #[error("there is no map yet: the memory agent has not seen all of guest RAM, or has no budget")]
    NoMap,
    /// The metrics cannot be written.
    #[error("the metrics cannot be written: {0}")]
    Metrics(String),
    /// A range is not guest RAM.
    #[error("{start:#x} to {end:#x} is not all guest RAM, or not whole pages")]
    Range {
        /// First guest physical address.
        start: u64,
        /// First behind it.
        end: u64,
    },
    /// Too many parts.
    #[error("{0} cells are too many, {MAX_CELLS} are possible")]
    Cells(u32),
}

impl VmmError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::NoWay | Self::Address(_) | Self::Cells(_) | Self::BalloonSize { .. } => FailureKind::Invalid,
            Self::NoGuest | Self::NotMigrating | Self::NoMigration | Self::NothingFollows => FailureKind::NotFound,
            Self::NoMap | Self::NoPowerButton | Self::NoBalloon | Self::Range { .. } => FailureKind::NotFound,
            Self::Migrating | Self::StillComing(_) => FailureKind::Busy,
            Self::HandedOver => FailureKind::HandedOver,
            Self::OnlyHere(_) => FailureKind::PagesOutstanding,
            Self::HasGuest | Self::Ending | Self::Hollow | Self::HadElsewhere(_) => FailureKind::WrongState,
            Self::Dump(DumpError::Running) => FailureKind::WrongState,
            Self::Join(_) | Self::Dump(_) | Self::Listen(_) | Self::Host(_) => FailureKind::Host,
            Self::Ram(_) | Self::Machine(_) | Self::Metrics(_) => FailureKind::Host,
        }
    }
}

impl From<VmmError> for Failure {
    fn from(e: VmmError) -> Self {
        Self::new(e.kind(), e.to_string())
    }
}

impl From<&SourceError> for Failure {
    fn from(e: &SourceError) -> Self {
        Self { kind: FailureKind::MigrationFailed, reason: Some(MigrationFailure::of(e)), text: e.to_string() }
    }
}
