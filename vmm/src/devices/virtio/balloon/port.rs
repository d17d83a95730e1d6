//! What somebody outside may ask of a balloon.

use std::fmt::Debug;
use std::sync::atomic::Ordering;
use std::time::Duration;

use memory_agent::ByteSize;
use serde::{Deserialize, Serialize};

use super::{Balloon, BalloonStats, PAGE};

/// How long a guest may take to give its statistics.
const STATS_LIMIT: Duration = Duration::from_secs(1);

/// What a balloon holds and what the guest says of its memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// How much the guest has been asked to give.
    pub target: ByteSize,
    /// How much it says that it has given.
    pub actual: ByteSize,
    /// What has become holes since the driver began, by the balloon and by reports of free pages. A page that comes again counts
    /// again.
    pub given_back: ByteSize,
    /// What it says of its memory, unless it has not answered within a second.
    pub stats: Option<BalloonStats>,
}

/// A balloon as the outside sees it.
pub trait BalloonPort: Send + Sync + Debug {
    /// Asks the guest to give `target`, in place of what it was asked for before. It does what it can.
    fn set_target(&self, target: ByteSize);

    /// What there is, with statistics that the guest is asked for now.
    fn status(&self) -> BalloonStatus;
}

impl BalloonPort for Balloon {
    fn set_target(&self, target: ByteSize) {
        let pages = u32::try_from(target.bytes() / PAGE).unwrap_or(u32::MAX);
        self.registers.target.store(pages, Ordering::SeqCst);
        if let Some(notify) = self.notify().as_ref() {
            notify.config();
        }
    }

    fn status(&self) -> BalloonStatus {
        let size = |pages: u32| ByteSize(u64::from(pages) * PAGE);
        BalloonStatus {
            target: size(self.registers.target.load(Ordering::SeqCst)),
            actual: size(self.registers.actual.load(Ordering::SeqCst)),
            given_back: ByteSize(self.statistics.given_back()),
            stats: self.statistics.ask(STATS_LIMIT),
        }
    }
}
