//! Further connections of one migration: how two monitors that have lost one another meet again, whoever calls.
//!
//! Post-copy has two channels, each a connection of its own, so that a page the guest waits for is never queued behind
//! others. Whoever connects names the migration and the channel; who connected is forgotten then.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::link::{Address, Link, LinkError, Listener};
use super::listening::{INTRODUCTION, Introduced, Over, Stranger, serve};
use super::wire::message::receive_message;
use super::wire::{
    Attempt, Channel, FrameReader, FrameWriter, Message, MigrationId, Refusal, RefusalReason, WireError, preamble,
};

/// Why a further connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody answers.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The other side made no sense.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The other side does not know this migration.
    #[error("the other side refuses: {}", .0.text)]
    Refused(Refusal),
    /// Another attempt has begun behind this one.
    #[error("the two sides have met another way")]
    Superseded,
    /// It has not come, though the other side has said that it has.
    #[error("the connection is gone already")]
    Gone,
}

/// Where the two channels of a migration come together.
#[derive(Debug)]
pub struct Channels {
    migration: MigrationId,
    state: Mutex<State>,
    changed: Condvar,
    /// Whoever answers connections for it is to stop.
    over: Over,
}

#[derive(Debug, Default)]
struct State {
    /// The newest that is known; everything below is of this one.
    attempt: Attempt,
    /// Joined and not taken yet.
    waiting: [Option<Link>; 2],
    /// Taken: to be ended when the other side comes anew.
    in_use: [Option<Link>; 2],
    closed: bool,
}

impl Channels {
    /// For one migration.
    pub fn new(migration: MigrationId) -> Self {
        Self { migration, state: Mutex::default(), changed: Condvar::new(), over: Over::default() }
    }

    /// The migration's name.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    /// Connects these channels to where the other side listens.
    ///
    /// # Errors
    /// When nobody answers there, or not the other side of this migration, or that has called meanwhile.
    pub fn connect(&self, address: &Address, channels: &[Channel]) -> Result<(), JoinError> {
        let attempt = self.lock().attempt.next().map_err(WireError::from)?;
        for &channel in channels {
            let mut link = Link::connect(address)?;
            link.set_deadline(Some(Instant::now() + INTRODUCTION));
            let mut writer = FrameWriter::new(link.try_clone().map_err(WireError::from)?);
            preamble::send(writer.link())?;
            let mut reader = FrameReader::new(link);
            preamble::receive(reader.link())?;
            Message::Join(self.migration, channel, attempt).send(&mut writer)?;
            match receive_message(&mut reader, "joined")? {
                Message::Joined => {
                    let mut link = reader.into_link();
                    link.set_deadline(None);
                    self.put(attempt, channel, link)?;
                }
                Message::Refuse(refusal) => return Err(JoinError::Refused(refusal)),
                other => return Err(WireError::Unexpected { found: other.name(), expected: "joined" }.into()),
            }
        }
        Ok(())
    }

    /// Takes a further connection, if it is the other side of this migration; who it is otherwise is told.
    pub(super) fn join(&self, mut introduced: Introduced<'_>) {
        let from = introduced.from.clone();
        let (channel, attempt) = match &introduced.first {
            Message::Join(migration, _, attempt) if *migration == self.migration && *attempt < self.lock().attempt => {
                let text = JoinError::Superseded.to_string();
                introduced.refuse(Refusal { reason: RefusalReason::Connection, text });
                return tracing::debug!(from, "a connection was not taken: {}", JoinError::Superseded);
            }
            Message::Join(migration, channel, attempt) if *migration == self.migration => (*channel, *attempt),
            _ => {
                let text = "another guest's memory is on its way here; this host takes one guest a process".into();
                introduced.refuse(Refusal { reason: RefusalReason::Busy, text });
                return tracing::warn!(from, "a connection was not taken: it belongs to no migration here");
            }
        };
        let put = Message::Joined.send(&mut introduced.writer).map_err(JoinError::from).and_then(|()| {
            introduced.accept();
            self.put(attempt, channel, introduced.reader.into_link())
        });
        if let Err(e) = put {
            tracing::warn!(from, "a connection was not taken: {e}");
        }
    }

    /// Answers whoever connects to `listener`, until this is closed.
    pub fn serve(&self, listener: &Listener) {
        serve(listener, &self.over, &|caller| match caller {
            Ok(introduced) => self.join(introduced),
            Err(_) if self.over.is_set() => {}
            Err(Stranger { from, error }) => tracing::warn!(from, "a connection was not taken: {error}"),
        });
    }

    /// A connection for `channel`; `None` when none has come in time, or none will.
    pub fn take(&self, channel: Channel, limit: Duration) -> Option<Link> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.waiting[channel as usize].is_none() {
            state = self.wait(state, deadline)?;
        }
        state.take(channel)
    }

    /// Connections for both channels, bulk first; `None` when they have not come in time, or will not.
    pub fn take_both(&self, limit: Duration) -> Option<(Link, Link)> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.waiting.iter().any(Option::is_none) {
            state = self.wait(state, deadline)?;
        }
        state.take(Channel::Bulk).zip(state.take(Channel::Faults))
    }

    /// A connection that is in use already: it ends when the other side comes anew.
    pub fn adopt(&self, channel: Channel, link: &Link) {
        self.lock().in_use[channel as usize] = link.try_clone().ok();
    }

    /// Nobody is waited for or answered any more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.over.set();
        self.changed.notify_all();
    }

    /// Whether that has been said.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn put(&self, attempt: Attempt, channel: Channel, link: Link) -> Result<(), JoinError> {
        let mut state = self.lock();
        if attempt < state.attempt {
            return Err(JoinError::Superseded);
        }
        if attempt > state.attempt {
            // Whoever began it has given up what is in use, and may know better.
            let State { waiting, in_use, .. } = &mut *state;
            let old = waiting.iter_mut().chain(in_use).filter_map(Option::take);
            old.for_each(|old| old.shutdown(std::net::Shutdown::Both));
            state.attempt = attempt;
        }
        state.waiting[channel as usize] = Some(link);
        self.changed.notify_all();
        Ok(())
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>, deadline: Instant) -> Option<MutexGuard<'s, State>> {
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero() && !state.closed)?;
        Some(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, channel: Channel) -> Option<Link> {
        let link = self.waiting[channel as usize].take()?;
        self.in_use[channel as usize] = link.try_clone().ok();
        Some(link)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::thread::scope;

    use super::*;

    const BOTH: [Channel; 2] = [Channel::Bulk, Channel::Faults];
    const SOON: Duration = Duration::from_millis(300);

    /// One of two sides, which listens.
    struct Side {
        channels: Channels,
        address: Address,
        listener: Listener,
    }

    impl Side {
        fn new(directory: &std::path::Path, name: &str) -> Self {
            let address = Address::Unix(directory.join(name));
            let listener = Listener::bind(&address).unwrap();
            Self { channels: Channels::new(MigrationId::from_bytes([7; 16])), address, listener }
        }
    }

    /// Whether a word that is said by each side on each channel is heard by the other.
    fn talk((bulk, faults): &mut (Link, Link)) -> bool {
        let mut channels = [(bulk, b'b'), (faults, b'f')];
        let said = channels.iter_mut().all(|(link, word)| {
            link.set_deadline(Some(Instant::now() + SOON));
            link.write_all(&[*word]).is_ok()
        });
        said && channels.iter_mut().all(|(link, word)| {
            let mut heard = [0];
            link.read_exact(&mut heard).is_ok() && heard == [*word]
        })
    }

    /// Closes it, also when the test fails: whoever serves it ends.
    struct Closing<'r>(&'r Channels);

    impl Drop for Closing<'_> {
        fn drop(&mut self) {
            self.0.close();
        }
    }

    #[test]
    fn a_channel_that_was_left_behind_is_paired_with_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (here, there) = (Side::new(directory.path(), "here"), Side::new(directory.path(), "there"));
        scope(|scope| {
            let _closing = Closing(&there.channels);
            scope.spawn(|| there.channels.serve(&there.listener));
            // Whoever called got no further than this, and calls again.
            here.channels.connect(&there.address, &[Channel::Faults]).unwrap();
            let taken = scope.spawn(|| there.channels.take_both(SOON * 10).is_some_and(|mut pair| talk(&mut pair)));
            here.channels.connect(&there.address, &BOTH).unwrap();
            let mut mine = here.channels.take_both(Duration::ZERO).unwrap();
            assert!(talk(&mut mine) && taken.join().unwrap());
        });
    }

    /// Takes the newest call, if there is one, or calls; whether the other side hears this one.
    fn meet(mine: &Side, other: &Side, pair: &mut Option<(Link, Link)>) -> bool {
        if let Some(newer) = mine.channels.take_both(Duration::ZERO) {
            *pair = Some(newer);
        }
        if pair.is_none() {
            // An error: the other side's call is the one that counts.
            let _ = mine.channels.connect(&other.address, &BOTH);
            *pair = mine.channels.take_both(SOON);
        }
        while let Some(newest) = pair {
            if talk(newest) {
                return true;
            }
            *pair = mine.channels.take_both(SOON);
        }
        false
    }

    #[test]
    fn sides_that_call_at_once_meet() {
        const TIMES: u32 = 1000;
        /// One's own call gives way to the other's, which may have failed by then.
        const CALLS: u32 = 4;
        let directory = tempfile::tempdir().unwrap();
        let (here, there) = (Side::new(directory.path(), "here"), Side::new(directory.path(), "there"));
        scope(|scope| {
            let _closing = (Closing(&here.channels), Closing(&there.channels));
            scope.spawn(|| here.channels.serve(&here.listener));
            scope.spawn(|| there.channels.serve(&there.listener));
            for time in 0..TIMES {
                let (mut mine, mut theirs) = (None, None);
                let have_met = (0..CALLS).any(|_| {
                    std::thread::scope(|scope| {
                        let other = scope.spawn(|| meet(&there, &here, &mut theirs));
                        meet(&here, &there, &mut mine) & other.join().unwrap()
                    })
                });
                assert!(have_met, "time {time}: they do not meet");
            }
        });
    }
}
