//! Listening: who connects says within a few seconds who it is, and nobody else waits for that.
//!
//! Anybody can connect. A connection is listened to in a thread of its own, from its first byte to its first message as a whole
//! in [`INTRODUCTION`], however slowly it comes; [`MOST`] are at a time. When there are as many, the one that began first gives
//! way to the next once it has had [`UNDISTURBED`], which is plenty for whoever has something to say: a crowd of strangers holds
//! nobody up for long.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::scope;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::link::{Link, Listener};
use super::wire::message::receive_message;
use super::wire::{Features, FrameReader, FrameWriter, MAX_INTRODUCTION, Message, Refusal, WireError, preamble};
use crate::host::thread;

/// How long the other side may take to say who it is.
pub(super) const INTRODUCTION: Duration = Duration::from_secs(5);
/// How many are listened to at a time.
const MOST: usize = 16;
/// For so long nobody has to give way to whoever came later.
const UNDISTURBED: Duration = Duration::from_millis(500);
/// How long the other side has to hear a refusal before the connection is closed.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long to leave alone what could not be done.
const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Says that nobody is listened to any more.
#[derive(Debug)]
pub(super) struct Over {
    is_over: AtomicBool,
    /// Without one it is seen a moment later.
    event: Option<OwnedFd>,
}

impl Default for Over {
    fn default() -> Self {
        Self { is_over: AtomicBool::new(false), event: eventfd(0, EventfdFlags::CLOEXEC).ok() }
    }
}

impl Over {
    /// Nobody is listened to from here on.
    pub(super) fn set(&self) {
        self.is_over.store(true, Ordering::SeqCst);
        if let Some(event) = &self.event {
            // Nobody reads it: it is readable from the first time on.
            let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
        }
    }

    /// Whether that has been said.
    pub(super) fn is_set(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// Waits for a connection; whether there may be one.
    fn wait(&self, listener: &Listener) -> bool {
        let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
        fds.extend(self.event.as_ref().map(|event| PollFd::new(event, PollFlags::IN)));
        let limit = self.event.is_none().then(|| Timespec::try_from(AGAIN_AFTER).ok()).flatten();
        poll(&mut fds, limit.as_ref()).is_ok() && !self.is_set() && !fds[0].revents().is_empty()
    }
}

/// A connection whose other side has said who it is, and gives way to nobody until it is refused.
pub(super) struct Introduced<'c> {
    /// What it sends from now on.
    pub(super) reader: FrameReader<Link>,
    /// What is sent to it.
    pub(super) writer: FrameWriter<Link>,
    /// What both sides can do.
    pub(super) features: Features,
    /// Its first message.
    pub(super) first: Message,
    /// Where it comes from, for people.
    pub(super) from: String,
    caller: Caller<'c>,
}

impl Introduced<'_> {
    /// It is who it should be, and has as long as anybody has.
    pub(super) fn accept(&mut self) {
        self.reader.set_limit(usize::MAX);
        self.reader.link().set_deadline(None);
        self.writer.link().set_deadline(None);
    }

    /// It is not taken.
    pub(super) fn refuse(mut self, refusal: Refusal) {
        self.caller.may_go(self.reader.link().try_clone().ok());
        refuse(&mut self.reader, &mut self.writer, refusal);
    }
}

/// A connection that was not taken.
#[derive(Debug)]
pub(super) struct Stranger {
    /// Where it came from, for people.
    pub(super) from: String,
    /// What was wrong with it.
    pub(super) error: WireError,
}

/// Listens to whoever connects, until `over`. `take` is told in threads of their own of whoever has said who it is, and of whoever
/// has not; while it works the other side is one of [`MOST`]. When this returns, nobody is listened to any more.
pub(super) fn serve(listener: &Listener, over: &Over, take: &(dyn Fn(Result<Introduced<'_>, Stranger>) + Sync)) {
    let callers = &Callers::default();
    scope(|scope| {
        while !over.is_set() {
            if !callers.make_room() || !over.wait(listener) {
                continue;
            }
            let accepted = listener.accept().map_err(|e| e.to_string()).and_then(|(link, from)| {
                let caller = callers.enter(&link).map_err(|e| e.to_string())?;
                let listen = move || take(introduce(link, from, caller));
                thread("introduction").and_then(|thread| thread.spawn_scoped(scope, listen)).map_err(|e| e.to_string())
            });
            if let Err(e) = accepted {
                tracing::warn!("a connection could not be listened to: {e}");
                drop(callers.wait(callers.lock(), AGAIN_AFTER));
            }
        }
        callers.end();
    });
}

/// Hears who somebody is.
fn introduce(mut link: Link, from: String, caller: Caller<'_>) -> Result<Introduced<'_>, Stranger> {
    link.set_deadline(Some(Instant::now() + INTRODUCTION));
    let mut writer = match link.try_clone() {
        Ok(link) => FrameWriter::new(link),
        Err(e) => return Err(Stranger { from, error: e.into() }),
    };
    let mut reader = FrameReader::new(link);
    reader.set_limit(MAX_INTRODUCTION);
    let heard = preamble::send(writer.link())
        .and_then(|()| preamble::receive(reader.link()))
        .and_then(|agreed| Ok((agreed, receive_message(&mut reader, "offer or join")?)));
    match heard {
        Ok((agreed, first)) => {
            caller.may_go(None);
            Ok(Introduced { reader, writer, features: agreed.features, first, from, caller })
        }
        Err(error) => {
            refuse(&mut reader, &mut writer, Refusal::of_wire(&error));
            Err(Stranger { from, error })
        }
    }
}

/// Tells the other side why, and waits until it has had time to read it: closing a TCP connection with unread data would
/// throw the message away.
pub(super) fn refuse(reader: &mut FrameReader<Link>, writer: &mut FrameWriter<Link>, refusal: Refusal) {
    let deadline = Some(Instant::now() + LAST_WORDS);
    writer.link().set_deadline(deadline);
    if Message::Refuse(refusal).send(writer).is_err() {
        return;
    }
    writer.link().shutdown(std::net::Shutdown::Write);
    reader.link().set_deadline(deadline);
    let mut rest = vec![0; 1 << 16];
    while let Ok(1..) = std::io::Read::read(reader.link(), &mut rest) {}
}

/// Those who are listened to.
#[derive(Default)]
struct Callers {
    present: Mutex<Vec<Present>>,
    left: Condvar,
    next: AtomicU64,
    /// Nobody is listened to any more.
    is_over: AtomicBool,
}

struct Present {
    number: u64,
    since: Instant,
    /// Ends the connection, of whoever may have to give way.
    link: Option<Link>,
}

/// One of them, until this is dropped.
struct Caller<'c> {
    callers: &'c Callers,
    number: u64,
}

impl Callers {
    fn enter(&self, link: &Link) -> std::io::Result<Caller<'_>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().push(Present { number, since: Instant::now(), link: Some(link.try_clone()?) });
        Ok(Caller { callers: self, number })
    }

    /// Whether there is room for one more, if need be in place of whoever has been here for the longest time; waits a moment when
    /// there is none.
    fn make_room(&self) -> bool {
        let mut present = self.lock();
        if present.len() < MOST {
            return true;
        }
        let longest = present.iter_mut().filter(|one| one.link.is_some()).min_by_key(|one| one.since);
        let left = longest.as_ref().map_or(AGAIN_AFTER, |one| UNDISTURBED.saturating_sub(one.since.elapsed()));
        if left.is_zero()
            && let Some(link) = longest.and_then(|one| one.link.take())
        {
            link.shutdown(std::net::Shutdown::Both);
        }
        // It leaves by itself, as anybody else may.
        drop(self.wait(present, left.max(Duration::from_millis(1))));
        false
    }

    /// Everybody is to leave who may have to.
    fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
        for link in self.lock().iter_mut().filter_map(|one| one.link.take()) {
            link.shutdown(std::net::Shutdown::Both);
        }
    }

    fn wait<'g>(&self, present: MutexGuard<'g, Vec<Present>>, limit: Duration) -> MutexGuard<'g, Vec<Present>> {
        self.left.wait_timeout(present, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Present>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Caller<'_> {
    /// Whether it may have to give way from here on: if so, by the end of this connection.
    fn may_go(&self, link: Option<Link>) {
        if let Some(own) = self.callers.lock().iter_mut().find(|one| one.number == self.number) {
            own.link = link;
        }
        if self.callers.is_over.load(Ordering::SeqCst) {
            self.callers.end();
        }
    }
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        self.callers.lock().retain(|one| one.number != self.number);
        self.callers.left.notify_all();
    }
}
