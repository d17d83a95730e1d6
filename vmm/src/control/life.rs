//! The life of a monitor's machine: where it is, and what may happen to it there. Pure: whoever calls does what follows.
//!
//! ```text
//!   Waiting ── arrives ──► Here ◄───────── stays ───────── Migrating
//!                           │  └──────── is sent ─────────►  │
//!                           ▲                                ├── moved, and this process stays ──► HandedOver
//!                           └── taken back (its memory is here) ───────────────────────────────────┘
//!   any of them ── ends; Migrating ── moved ──► Gone
//! ```
//! While it is [`Life::Migrating`] the guest may run at the destination already and need pages from here (post-copy): how
//! many, its [`Sent`] says, which the migration's own threads keep.

use super::error::VmmError;

/// Why a monitor ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// Somebody asked it to.
    Quit,
    /// The guest runs elsewhere now.
    Migrated,
}

/// A migration, as far as the machine's life depends on it.
pub(super) trait Sent {
    /// Pages of a guest that runs elsewhere which are only here.
    fn outstanding(&self) -> u64;
}

/// A guest whose memory is still coming here.
pub(super) trait Coming {
    /// Pages that are still to come.
    fn to_come(&self) -> u64;
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MigrationEnd {
    /// The guest has not moved.
    Stays,
    /// It runs at the destination; with `given_back`, its memory is not here any more.
    Moved {
        /// Whether memory has been given back to this host.
        given_back: bool,
        /// Whether this process stays.
        stay: bool,
    },
    /// It was handed over, and nobody has said that it runs there.
    Unconfirmed,
}

/// Where the machine is.
#[derive(Debug, Default)]
pub(super) enum Life<M, C, S> {
    /// None has come yet.
    #[default]
    Waiting,
    /// It is here; with `coming`, not all of its memory.
    Here { machine: M, coming: Option<C> },
    /// It is being sent.
    Migrating { machine: M, migration: S },
    /// It was handed over; unless memory has been given back, it could go on here.
    HandedOver { machine: M, given_back: bool },
    /// The monitor ends.
    Gone { machine: Option<M>, coming: Option<C>, reason: ExitReason },
}

impl<M: Clone, C: Coming, S: Sent> Life<M, C, S> {
    /// The machine, wherever it runs.
    pub(super) fn machine(&self) -> Result<M, VmmError> {
        match self {
            Self::Waiting | Self::Gone { machine: None, .. } => Err(VmmError::NoGuest),
            Self::Here { machine, .. }
            | Self::Migrating { machine, .. }
            | Self::HandedOver { machine, .. }
            | Self::Gone { machine: Some(machine), .. } => Ok(machine.clone()),
        }
    }

    /// What is still to come of its memory.
    pub(super) fn coming(&self) -> Option<&C> {
        match self {
            Self::Here { coming, .. } | Self::Gone { coming, .. } => coming.as_ref(),
            _ => None,
        }
    }

    /// The migration that is under way.
    pub(super) fn migration(&self) -> Option<&S> {
        match self {
            Self::Migrating { migration, .. } => Some(migration),
            _ => None,
        }
    }

    /// Pages that a guest elsewhere needs and that are only here.
    pub(super) fn only_here(&self) -> u64 {
        self.migration().map_or(0, Sent::outstanding)
    }

    /// Why the monitor ends, if it does.
    pub(super) fn exit_reason(&self) -> Option<ExitReason> {
        match self {
            Self::Gone { reason, .. } => Some(*reason),
            _ => None,
        }
    }

    /// A machine is here.
    pub(super) fn arrives(&mut self, machine: M, coming: Option<C>) -> Result<(), VmmError> {
        match self {
            Self::Waiting => {
                *self = Self::Here { machine, coming };
                Ok(())
            }
            Self::Gone { .. } => Err(VmmError::Ending),
            _ => Err(VmmError::HasGuest),
        }
    }

    /// All of its memory is here, or nobody needs it any more; gives what was to come.
    pub(super) fn is_whole(&mut self) -> Option<C> {
        match self {
            Self::Here { coming, .. } | Self::Gone { coming, .. } => coming.take(),
            _ => None,
        }
    }

    /// It is sent.
    pub(super) fn is_sent(&mut self, migration: S) -> Result<M, VmmError> {
        // What has not come looks like a hole, and would be sent as zeros.
        if let Some(coming) = self.coming() {
            return Err(VmmError::StillComing(coming.to_come()));
        }
        let machine = self.at_rest()?;
        *self = Self::Migrating { machine: machine.clone(), migration };
        Ok(machine)
    }

    /// Its migration has ended.
    pub(super) fn migration_ends(&mut self, end: MigrationEnd) {
        let Self::Migrating { machine, .. } = self else { return };
        let machine = machine.clone();
        *self = match end {
            MigrationEnd::Stays => Self::Here { machine, coming: None },
            MigrationEnd::Unconfirmed => Self::HandedOver { machine, given_back: false },
            MigrationEnd::Moved { given_back, stay: true } => Self::HandedOver { machine, given_back },
            MigrationEnd::Moved { stay: false, .. } => {
                Self::Gone { machine: Some(machine), coming: None, reason: ExitReason::Migrated }
            }
        };
    }

    /// The machine, if it is here and stays.
    pub(super) fn at_rest(&self) -> Result<M, VmmError> {
        match self {
            Self::Waiting => Err(VmmError::NoGuest),
            Self::Here { machine, .. } => Ok(machine.clone()),
            Self::Migrating { .. } => Err(VmmError::Migrating),
            Self::HandedOver { given_back: true, .. } => Err(VmmError::Hollow),
            Self::HandedOver { .. } => Err(VmmError::HandedOver),
            Self::Gone { .. } => Err(VmmError::Ending),
        }
    }

    /// The machine, if its guest may run elsewhere and could go on here.
    pub(super) fn handed_over(&self) -> Option<M> {
        match self {
            Self::HandedOver { machine, given_back: false } => Some(machine.clone()),
            _ => None,
        }
    }

    /// Somebody knows that it does not run elsewhere: it is here again.
    pub(super) fn is_taken_back(&mut self) -> Result<M, VmmError> {
        if let Self::HandedOver { machine, given_back: false } = self {
            *self = Self::Here { machine: machine.clone(), coming: None };
        }
        self.at_rest()
    }

    /// The monitor ends. A migration that is under way is given, to be cancelled.
    pub(super) fn ends(&mut self, reason: ExitReason, force: bool) -> Result<Option<S>, VmmError> {
        let left = self.only_here();
        if left > 0 && !force {
            return Err(VmmError::OnlyHere(left));
        }
        if let Self::Gone { .. } = self {
            return Ok(None);
        }
        let machine = self.machine().ok();
        let coming = self.is_whole();
        match std::mem::replace(self, Self::Gone { machine, coming, reason }) {
            Self::Migrating { migration, .. } => Ok(Some(migration)),
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pages(u64);

    impl Sent for Pages {
        fn outstanding(&self) -> u64 {
            self.0
        }
    }

    impl Coming for Pages {
        fn to_come(&self) -> u64 {
            self.0
        }
    }

    type Tested = Life<&'static str, Pages, Pages>;

    /// A life in each of its states, by name.
    fn states() -> Vec<(&'static str, Tested)> {
        let machine = "machine";
        vec![
            ("waiting", Life::Waiting),
            ("here", Life::Here { machine, coming: None }),
            ("coming", Life::Here { machine, coming: Some(Pages(5)) }),
            ("migrating", Life::Migrating { machine, migration: Pages(0) }),
            ("post-copy", Life::Migrating { machine, migration: Pages(7) }),
            ("handed over", Life::HandedOver { machine, given_back: false }),
            ("given back", Life::HandedOver { machine, given_back: true }),
            ("gone", Life::Gone { machine: Some(machine), coming: None, reason: ExitReason::Migrated }),
        ]
    }

    fn name(life: &Tested) -> &'static str {
        match life {
            Life::Waiting => "waiting",
            Life::Here { coming: None, .. } => "here",
            Life::Here { .. } => "coming",
            Life::Migrating { migration: Pages(0), .. } => "migrating",
            Life::Migrating { .. } => "post-copy",
            Life::HandedOver { given_back: false, .. } => "handed over",
            Life::HandedOver { .. } => "given back",
            Life::Gone { .. } => "gone",
        }
    }

    /// What happens, as what came of it and the state behind it.
    type Event = fn(&mut Tested) -> Result<(), VmmError>;

    /// Drives a life in each state through `event`; gives where it is then, or why that was not possible and that it is
    /// where it was.
    fn drive(event: Event) -> Vec<(&'static str, String)> {
        let drive_one = |(before, mut life): (&'static str, Tested)| {
            let result = event(&mut life);
            let after = match result {
                Ok(()) => name(&life).to_owned(),
                Err(e) => {
                    assert_eq!(name(&life), before, "{e} has changed it");
                    format!("{e:?}")
                }
            };
            (before, after)
        };
        states().into_iter().map(drive_one).collect()
    }

    fn ended(life: &mut Tested, end: MigrationEnd) -> Result<(), VmmError> {
        life.migration_ends(end);
        Ok(())
    }

    fn is(event: Event, expected: [&str; 8]) {
        let (before, found): (Vec<_>, Vec<_>) = drive(event).into_iter().unzip();
        assert_eq!(found, expected, "from {before:?}");
    }

    #[test]
    fn every_event_in_every_state() {
        is(
            |life| life.arrives("machine", None),
            ["here", "HasGuest", "HasGuest", "HasGuest", "HasGuest", "HasGuest", "HasGuest", "Ending"],
        );
        is(
            |life| {
                life.is_whole();
                Ok(())
            },
            ["waiting", "here", "here", "migrating", "post-copy", "handed over", "given back", "gone"],
        );
        is(
            |life| life.is_sent(Pages(0)).map(drop),
            ["NoGuest", "migrating", "StillComing(5)", "Migrating", "Migrating", "HandedOver", "Hollow", "Ending"],
        );
        is(
            |life| ended(life, MigrationEnd::Stays),
            ["waiting", "here", "coming", "here", "here", "handed over", "given back", "gone"],
        );
        is(
            |life| ended(life, MigrationEnd::Unconfirmed),
            ["waiting", "here", "coming", "handed over", "handed over", "handed over", "given back", "gone"],
        );
        is(
            |life| ended(life, MigrationEnd::Moved { given_back: true, stay: true }),
            ["waiting", "here", "coming", "given back", "given back", "handed over", "given back", "gone"],
        );
        is(
            |life| ended(life, MigrationEnd::Moved { given_back: false, stay: false }),
            ["waiting", "here", "coming", "gone", "gone", "handed over", "given back", "gone"],
        );
        is(
            |life| life.at_rest().map(drop),
            ["NoGuest", "here", "coming", "Migrating", "Migrating", "HandedOver", "Hollow", "Ending"],
        );
        is(
            |life| life.is_taken_back().map(drop),
            ["NoGuest", "here", "coming", "Migrating", "Migrating", "here", "Hollow", "Ending"],
        );
        is(
            |life| life.ends(ExitReason::Quit, false).map(drop),
            ["gone", "gone", "gone", "gone", "OnlyHere(7)", "gone", "gone", "gone"],
        );
        is(|life| life.ends(ExitReason::Quit, true).map(drop), ["gone"; 8]);
    }

    #[test]
    fn the_first_reason_to_end_counts_and_a_migration_ends_with_it() {
        let mut life: Tested = Life::Migrating { machine: "machine", migration: Pages(3) };
        assert_eq!(life.ends(ExitReason::Quit, true).unwrap().map(|migration| migration.0), Some(3));
        assert!(life.ends(ExitReason::Migrated, true).unwrap().is_none());
        life.migration_ends(MigrationEnd::Moved { given_back: false, stay: false });
        assert_eq!(life.exit_reason(), Some(ExitReason::Quit));
        assert_eq!(life.machine().unwrap(), "machine");
    }
}
