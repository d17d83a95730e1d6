//! A migration as others see it: it has an id, its progress can be watched by any number of clients, and it ends when it
//! is done or cancelled, whoever has gone meanwhile.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::failure::{Failure, MigrationFailure};
use super::life::Sent;
use crate::migration::cancel::Cancel;
use crate::migration::link::Address;
use crate::migration::progress::{Progress, Report};
use crate::migration::source::PostCopyControl;

/// Progress is shown this often at most, unless the phase changes.
const SHOWN_EVERY: Duration = Duration::from_millis(100);
/// How much of it is kept for whoever is slow to read it.
const KEPT: usize = 256;

/// What has become of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// It is under way.
    Running,
    /// The guest runs at the destination.
    Done,
    /// It was cancelled.
    Cancelled,
    /// It failed.
    Failed,
}

/// The answer to [`Request::Migration`](super::Request::Migration).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Its number in this process, from 1.
    pub id: u64,
    /// Where to.
    pub to: String,
    /// What has become of it.
    pub state: MigrationState,
    /// How far it is, or came.
    pub progress: Option<Progress>,
    /// What it was like, once it is done.
    pub report: Option<Report>,
    /// Why it did not succeed.
    pub failure: Option<Failure>,
}

/// What somebody who watches hears next.
#[derive(Clone, Debug)]
pub(super) enum News {
    /// How far it is.
    Progress(Progress),
    /// How it ended.
    Ended(Result<Report, Failure>),
    /// Nothing for a while.
    Nothing,
}

#[derive(Debug, Default)]
struct Shown {
    /// The last of what was shown, and how many there were before.
    kept: VecDeque<Progress>,
    dropped: u64,
    last: Option<Instant>,
    outcome: Option<Result<Report, Failure>>,
}

/// What can be done about a migration that is under way. Both hold its connections.
#[derive(Clone, Debug, Default)]
pub(super) struct Handles {
    /// How it is given up.
    pub(super) cancel: Arc<Cancel>,
    /// What is left to post-copy, where something may.
    pub(super) post_copy_source: Option<Arc<PostCopyControl>>,
}

/// A migration.
#[derive(Debug)]
pub(super) struct Migration {
    pub(super) id: u64,
    pub(super) to: Address,
    /// Whether the process stays when the guest has moved.
    pub(super) stay: bool,
    /// Until it has ended.
    handles: Mutex<Option<Handles>>,
    shown: Mutex<Shown>,
    changed: Condvar,
}

impl Sent for Arc<Migration> {
    fn outstanding(&self) -> u64 {
        self.post_copy_source().map_or(0, |post_copy_source| post_copy_source.left())
    }
}

impl Migration {
    pub(super) fn new(id: u64, to: Address, stay: bool, post_copy_source: Option<Arc<PostCopyControl>>) -> Self {
        let handles = Mutex::new(Some(Handles { post_copy_source, ..Handles::default() }));
        let (shown, changed) = Default::default();
        Self { id, to, stay, handles, shown, changed }
    }

    /// What can be done about it; `None` once it has ended.
    pub(super) fn handles(&self) -> Option<Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is left to post-copy, where something may, until it has ended.
    pub(super) fn post_copy_source(&self) -> Option<Arc<PostCopyControl>> {
        self.handles()?.post_copy_source
    }

    /// Gives it up, if it has not ended.
    pub(super) fn cancel(&self) {
        if let Some(handles) = self.handles() {
            handles.cancel.cancel();
        }
    }

    /// Shows how far it is.
    pub(super) fn show(&self, progress: &Progress) {
        let mut shown = self.lock();
        let is_same = shown.kept.back().is_some_and(|last| last.phase == progress.phase);
        if is_same && shown.last.is_some_and(|at| at.elapsed() < SHOWN_EVERY) {
            return;
        }
        if shown.kept.len() == KEPT {
            shown.kept.pop_front();
            shown.dropped += 1;
        }
        shown.kept.push_back(progress.clone());
        shown.last = Some(Instant::now());
        self.changed.notify_all();
    }

    /// Says how it ended, and lets its connections go.
    pub(super) fn end(&self, outcome: Result<Report, Failure>) {
        *self.handles.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.lock().outcome = Some(outcome);
        self.changed.notify_all();
    }

    /// Where somebody begins to watch who has seen nothing of it yet: with what was shown last.
    pub(super) fn now(&self) -> u64 {
        let shown = self.lock();
        (shown.dropped + shown.kept.len() as u64).saturating_sub(1)
    }

    /// What comes next for somebody who has seen `seen` of what was shown; waits for `limit` at most.
    pub(super) fn next(&self, seen: &mut u64, limit: Duration) -> News {
        let is_quiet = |shown: &mut Shown| *seen >= shown.dropped + shown.kept.len() as u64 && shown.outcome.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), limit, is_quiet);
        let (shown, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let next = (*seen).max(shown.dropped);
        if let Some(progress) = shown.kept.get((next - shown.dropped) as usize) {
            *seen = next + 1;
            return News::Progress(progress.clone());
        }
        shown.outcome.clone().map_or(News::Nothing, News::Ended)
    }

    /// Waits until it has ended, for `limit` at most.
    pub(super) fn wait(&self, limit: Duration) {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |shown| shown.outcome.is_none());
        drop(waited);
    }

    /// What has become of it.
    pub(super) fn status(&self) -> MigrationStatus {
        let shown = self.lock();
        let state = match &shown.outcome {
            None => MigrationState::Running,
            Some(Ok(_)) => MigrationState::Done,
            Some(Err(e)) if e.reason == Some(MigrationFailure::Cancelled) => MigrationState::Cancelled,
            Some(Err(_)) => MigrationState::Failed,
        };
        let (report, failure) = match shown.outcome.clone() {
            None => (None, None),
            Some(Ok(report)) => (Some(report), None),
            Some(Err(failure)) => (None, Some(failure)),
        };
        let progress = shown.kept.back().cloned();
        MigrationStatus { id: self.id, to: self.to.to_string(), state, progress, report, failure }
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::failure::FailureKind;
    use crate::migration::progress::Phase;

    fn progress(phase: Phase, round: u32) -> Progress {
        Progress { phase, round, ..Progress::at_start(0) }
    }

    fn migration() -> Migration {
        Migration::new(3, "unix:/nowhere".parse().unwrap(), false, None)
    }

    fn failure(reason: MigrationFailure) -> Failure {
        Failure { kind: FailureKind::MigrationFailed, reason: Some(reason), text: "no".into() }
    }

    fn rounds_seen(migration: &Migration, seen: &mut u64) -> Vec<u32> {
        std::iter::from_fn(|| match migration.next(seen, Duration::ZERO) {
            News::Progress(progress) => Some(progress.round),
            _ => None,
        })
        .collect()
    }

    #[test]
    fn every_watcher_hears_every_phase_and_the_end() {
        let migration = migration();
        let (mut early, mut late) = (migration.now(), 0);
        for (round, phase) in [Phase::Negotiating, Phase::Hot, Phase::Cold].into_iter().enumerate() {
            migration.show(&progress(phase, round as u32));
        }
        // Of one phase no more than anybody can read.
        migration.show(&progress(Phase::Cold, 9));
        assert_eq!(rounds_seen(&migration, &mut early), [0, 1, 2]);
        assert_eq!(rounds_seen(&migration, &mut late), [0, 1, 2]);
        let mut newcomer = migration.now();
        assert_eq!(rounds_seen(&migration, &mut newcomer), [2]);
        assert!(matches!(migration.next(&mut early, Duration::ZERO), News::Nothing));
        migration.end(Err(failure(MigrationFailure::NotConverging)));
        for seen in [&mut early, &mut late, &mut newcomer] {
            assert!(matches!(migration.next(seen, Duration::ZERO), News::Ended(Err(_))));
        }
    }

    #[test]
    fn whoever_is_slow_misses_what_is_old() {
        let migration = migration();
        let mut seen = 0;
        for round in 0..2 * KEPT as u32 {
            let phase = if round % 2 == 0 { Phase::Hot } else { Phase::Cold };
            migration.show(&progress(phase, round));
        }
        let rounds = rounds_seen(&migration, &mut seen);
        assert_eq!((rounds.len(), rounds[0]), (KEPT, KEPT as u32));
    }

    #[test]
    fn whoever_waits_wakes_at_the_end() {
        let migration = migration();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| migration.next(&mut 0, Duration::from_secs(60)));
            migration.end(Err(failure(MigrationFailure::Cancelled)));
            assert!(matches!(waiter.join().unwrap(), News::Ended(_)));
        });
        migration.wait(Duration::from_secs(60));
        assert!(migration.handles().is_none(), "it keeps its connections");
    }

    #[test]
    fn its_result_can_be_asked_for_when_it_has_ended() {
        let migration = migration();
        migration.show(&progress(Phase::Hot, 1));
        let status = migration.status();
        assert_eq!((status.id, status.state, status.to.as_str()), (3, MigrationState::Running, "unix:/nowhere"));
        migration.end(Err(failure(MigrationFailure::Cancelled)));
        let status = migration.status();
        assert_eq!(status.state, MigrationState::Cancelled);
        assert_eq!(status.progress.map(|progress| progress.round), Some(1));
        assert!(status.failure.is_some() && status.report.is_none());
    }
}
