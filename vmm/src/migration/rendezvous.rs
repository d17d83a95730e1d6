//! Further connections of one migration: how two monitors that have lost one another meet again, whoever calls.
//!
//! A tail has two channels, each a connection of its own, so that a page the guest waits for is never queued behind
//! others. Whoever connects names the migration and the channel; who connected is forgotten then.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::link::{Address, Link, LinkError, Listener};
use super::wire::message::receive_message;
use super::wire::{FrameReader, FrameWriter, Message, Refusal, RefusalReason, WireError, preamble};

/// How long a stranger may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// How often whoever listens looks whether it still should.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// What names a migration: nobody can guess it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session([u8; 16]);

impl Session {
    /// A new one.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn new() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        // So few bytes come all at once or not at all (getrandom(2)).
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    /// One whose bytes are known.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Channel {
    /// Pages that nobody waits for, and what has become of all of them.
    Bulk,
    /// Pages that the guest waits for.
    Faults,
}

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
    /// A connection that belongs to no migration here.
    #[error("a connection that belongs to no migration here")]
    Stranger,
}

/// Where the two channels of a migration come together.
#[derive(Debug)]
pub struct Rendezvous {
    session: Session,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Joined and not taken yet.
    waiting: [Option<Link>; 2],
    /// Taken: to be ended when the other side comes anew.
    in_use: [Option<Link>; 2],
    closed: bool,
}

impl Rendezvous {
    /// For one migration.
    pub fn new(session: Session) -> Self {
        Self { session, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The migration's name.
    pub fn session(&self) -> Session {
        self.session
    }

    /// Connects these channels to where the other side listens.
    ///
    /// # Errors
    /// When nobody answers there, or not the other side of this migration.
    pub fn connect(&self, address: &Address, channels: &[Channel]) -> Result<(), JoinError> {
        for &channel in channels {
            let link = Link::connect(address)?;
            let mut writer = FrameWriter::new(link.try_clone().map_err(WireError::from)?);
            preamble::send(writer.link())?;
            let mut reader = FrameReader::new(link);
            preamble::receive(reader.link())?;
            Message::Join(self.session, channel).send(&mut writer)?;
            match receive_message(&mut reader, "joined")? {
                Message::Joined => self.put(channel, reader.into_link()),
                Message::Refuse(refusal) => return Err(JoinError::Refused(refusal)),
                other => return Err(WireError::Unexpected { found: other.name(), expected: "joined" }.into()),
            }
        }
        Ok(())
    }

    /// Answers whoever has connected.
    ///
    /// # Errors
    /// When it is not the other side of this migration; it has been told.
    pub fn answer(&self, link: Link) -> Result<(), JoinError> {
        let mut link = link;
        link.set_deadline(Some(Instant::now() + INTRODUCTION));
        let mut writer = FrameWriter::new(link.try_clone().map_err(WireError::from)?);
        preamble::send(writer.link())?;
        let mut reader = FrameReader::new(link);
        preamble::receive(reader.link())?;
        match receive_message(&mut reader, "join")? {
            Message::Join(session, channel) if session == self.session => {
                Message::Joined.send(&mut writer)?;
                let mut link = reader.into_link();
                link.set_deadline(None);
                self.put(channel, link);
                Ok(())
            }
            _ => {
                let text = "another guest's memory is on its way here; this host takes one guest a process".into();
                Message::Refuse(Refusal { reason: RefusalReason::Connection, text }).send(&mut writer)?;
                Err(JoinError::Stranger)
            }
        }
    }

    /// Answers whoever connects to `listener`, until this is closed.
    pub fn serve(&self, listener: &Listener) {
        while !self.is_closed() {
            if !matches!(poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&LOOK)), Ok(1..)) {
                continue;
            }
            let answered = listener.accept().map_err(JoinError::from).and_then(|link| self.answer(link));
            if let Err(e) = answered {
                tracing::warn!("a connection was not taken: {e}");
            }
        }
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
        self.changed.notify_all();
    }

    /// Whether that has been said.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn put(&self, channel: Channel, link: Link) {
        let mut state = self.lock();
        // The other side has given up what is in use, and may know better.
        state.in_use.iter_mut().filter_map(Option::take).for_each(|old| old.shutdown(std::net::Shutdown::Both));
        state.waiting[channel as usize] = Some(link);
        self.changed.notify_all();
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
