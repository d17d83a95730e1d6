//! Why a machine did not arrive.

use crate::machine::MachineError;
use crate::migration::link::LinkError;
use crate::migration::wire::{Refusal, RefusalReason, WireError};
use crate::ram::RamError;

/// Why a machine did not arrive, from the destination's side. The guest has not run here.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// No connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// This host does not take the machine.
    #[error("refused: {}", .0.text)]
    Refused(Refusal),
    /// The connection or what came over it.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The source said that it keeps the guest.
    #[error("the source keeps the guest: {0}")]
    Aborted(String),
    /// The source says that all is sent and it is not.
    #[error("{0} pages never came")]
    Incomplete(u64),
    /// Pages could not be put into guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The machine could not be set up as it was.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A thread could not be started, or ended.
    #[error("a thread that lands pages could not go on: {0}")]
    Thread(String),
    /// Somebody gave it up.
    #[error("cancelled before the guest arrived; it stays with the source")]
    Cancelled,
}

impl DestinationError {
    /// What the source is told, unless it knows or need not know.
    pub(super) fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Aborted(_) | Self::Cancelled => None,
            Self::Refused(refusal) => Some(refusal.clone()),
            Self::Wire(e) => Some(Refusal::of_wire(e)),
            Self::Machine(e) if e.is_of_state() => {
                Some(Refusal { reason: RefusalReason::Stream, text: self.to_string() })
            }
            Self::Machine(e) if e.is_of_backends() => {
                Some(Refusal { reason: RefusalReason::Devices, text: self.to_string() })
            }
            _ => Some(Refusal { reason: RefusalReason::Host, text: self.to_string() }),
        }
    }
}
