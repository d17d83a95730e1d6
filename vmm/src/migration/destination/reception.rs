//! Who may bring a guest here: one at a time, and one in all.
//!
//! Listens until a guest has come with all of its memory. The first acceptable offer wins; whoever offers another machine
//! meanwhile, or behind that, is told so. A machine that is refused or does not arrive leaves nothing behind, and the next may
//! come. Further connections of the migration under way come in here, too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{DestinationError, DestinationMachine, Expected, PostCopy, prepare, receive};
use crate::host::thread;
use crate::migration::cancel::Cancel;
use crate::migration::channels::Channels;
use crate::migration::link::Listener;
use crate::migration::listening::{Introduced, Over, Stranger, serve};
use crate::migration::stoppable::{Stoppable, in_this_span};
use crate::migration::wire::{Features, Message, Offer, Refusal, RefusalReason, WireError};

/// What becomes of a guest that comes in.
#[derive(Debug)]
pub enum Arrival<M> {
    /// It runs here; in post-copy, not all of its memory is here yet.
    Running(Arc<M>, Option<Arc<PostCopy>>),
    /// All of its memory is here, and nobody is listened to any more.
    Whole,
    /// It does not come, and nobody is listened to any more.
    Failed(DestinationError),
}

/// How guests are received.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// How long a source may stay away whose pages follow the guest, before the guest is stopped.
    pub source_timeout: Duration,
    /// Whether whatever fails first is the end of it, a connection that is no migration's included.
    pub once: bool,
}

/// Makes the machine that is offered, or says why not.
type Prepare<M> = Box<dyn Fn(&Offer) -> Result<M, Refusal> + Send + Sync>;
/// Hears what becomes of it.
type Report<M> = Box<dyn Fn(Arrival<M>) + Send + Sync>;

/// Somebody who listens for a guest, until this is dropped.
pub struct Reception<M: DestinationMachine> {
    shared: Arc<Shared<M>>,
    _thread: Stoppable,
}

impl<M: DestinationMachine> std::fmt::Debug for Reception<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reception").field("terms", &self.shared.terms).finish_non_exhaustive()
    }
}

struct Shared<M> {
    terms: Terms,
    prepare: Prepare<M>,
    report: Report<M>,
    over: Over,
    place: Mutex<Place>,
}

/// The place for one guest.
enum Place {
    Free,
    /// For a guest that is on its way.
    Taken(Arc<Cancel>, Option<Arc<Channels>>),
    /// By a guest that runs here.
    Arrived(Option<Arc<Channels>>),
}

impl<M: DestinationMachine + Send + 'static> Reception<M> {
    /// Listens to whoever connects to `listener`. `prepare` makes the machine that is offered, or says why not, and may be asked
    /// again and again; `report` hears what becomes of it, in another thread.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn open(
        listener: Listener,
        terms: Terms,
        prepare: impl Fn(&Offer) -> Result<M, Refusal> + Send + Sync + 'static,
        report: impl Fn(Arrival<M>) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            terms,
            prepare: Box::new(prepare),
            report: Box::new(report),
            over: Over::default(),
            place: Mutex::new(Place::Free),
        });
        let (closer, server) = (Arc::clone(&shared), Arc::clone(&shared));
        let thread = Stoppable::spawn(
            "listen",
            move || closer.over.set(),
            move || {
                serve(&listener, &server.over, &|caller| server.hear(caller));
            },
        )?;
        Ok(Self { shared, _thread: thread })
    }

    /// Nobody is listened to any more, and a guest that is on its way is given up if it does not run here yet.
    pub fn cancel(&self) {
        self.shared.over.set();
        if let Place::Taken(cancel, _) = &*self.shared.lock() {
            cancel.cancel();
        }
    }
}

impl<M: DestinationMachine + Send + 'static> Shared<M> {
    /// Somebody has connected, and said who it is or not.
    fn hear(self: &Arc<Self>, caller: Result<Introduced<'_>, Stranger>) {
        let introduced = match caller {
            Ok(introduced) => introduced,
            Err(Stranger { from, error }) => return self.failed(&from, error.into()),
        };
        match &introduced.first {
            // What was not agreed upon is not understood.
            Message::Offer(offer) if !offer.post_copy || introduced.features.has(Features::POST_COPY) => {
                let offer = offer.clone();
                self.consider(&offer, introduced);
            }
            Message::Join(..) => {
                let channels = self.lock().channels().cloned();
                match channels {
                    Some(channels) => channels.join(introduced),
                    None => {
                        let text = "no memory of that guest is on its way here".into();
                        self.turn_away(introduced, Refusal { reason: RefusalReason::Connection, text });
                    }
                }
            }
            other => {
                let error = WireError::Unexpected { found: other.name(), expected: "offer" };
                let from = introduced.from.clone();
                introduced.refuse(Refusal::of_wire(&error));
                self.failed(&from, error.into());
            }
        }
    }

    /// Takes a machine that is offered, if it can be here and there is a place for it.
    fn consider(self: &Arc<Self>, offer: &Offer, mut introduced: Introduced<'_>) {
        // Held while the machine is made, so that the first that can be here is the one.
        let mut place = self.lock();
        let prepared = match place.busy() {
            Some(text) => Err(Refusal { reason: RefusalReason::Busy, text: text.into() }),
            None => prepare(offer, &self.prepare),
        };
        let (machine, channels) = match prepared {
            Ok(prepared) => prepared,
            Err(refusal) => {
                drop(place);
                return self.turn_away(introduced, refusal);
            }
        };
        let cancel = Arc::new(Cancel::default());
        *place = Place::Taken(Arc::clone(&cancel), channels.clone());
        drop(place);
        introduced.accept();
        let Introduced { reader, writer, from, .. } = introduced;
        let Offer { id, cold, window, .. } = *offer;
        let _span = tracing::info_span!("migration", %id, side = "destination").entered();
        self.start(Expected { machine, cold, window, channels, reader, writer }, from, cancel);
    }

    fn turn_away(&self, introduced: Introduced<'_>, refusal: Refusal) {
        let from = introduced.from.clone();
        introduced.refuse(refusal.clone());
        self.failed(&from, DestinationError::Refused(refusal));
    }

    /// Receives a guest in a thread of its own.
    fn start(self: &Arc<Self>, expected: Expected<M>, from: String, cancel: Arc<Cancel>) {
        let shared = Arc::clone(self);
        let source_timeout = self.terms.source_timeout;
        let run = move || match receive(expected, source_timeout, &cancel, || shared.free()) {
            Ok(arrived) => {
                {
                    let mut place = shared.lock();
                    *place = Place::Arrived(place.channels().cloned());
                }
                (shared.report)(Arrival::Running(Arc::clone(&arrived.machine), arrived.post_copy()));
                arrived.page_out_rest();
                shared.over.set();
                (shared.report)(Arrival::Whole);
            }
            Err(error) => shared.failed(&from, error),
        };
        if let Err(e) = thread("incoming").and_then(|thread| thread.spawn(in_this_span(run))) {
            self.free();
            self.failed("this host", DestinationError::Thread(e.to_string()));
        }
    }

    /// A guest that was on its way does not come.
    fn free(&self) {
        *self.lock() = Place::Free;
    }

    /// Somebody has brought no guest. Where that is the end of it, it is not while somebody else's is on its way.
    fn failed(&self, from: &str, error: DestinationError) {
        if self.over.is_set() {
            return;
        }
        let is_free = matches!(*self.lock(), Place::Free);
        if !is_free {
            tracing::warn!(from, "a connection was not taken: {error}");
        } else if self.terms.once {
            self.over.set();
            (self.report)(Arrival::Failed(error));
        } else {
            tracing::warn!(from, "no guest has come, waiting for another: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Why there is no place for another guest.
    fn busy(&self) -> Option<&'static str> {
        match self {
            Self::Free => None,
            Self::Taken(..) => Some("another guest is on its way here, and this process takes one"),
            Self::Arrived(_) => Some("another guest has come here, and this process takes one"),
        }
    }

    fn channels(&self) -> Option<&Arc<Channels>> {
        match self {
            Self::Free => None,
            Self::Taken(_, channels) | Self::Arrived(channels) => channels.as_ref(),
        }
    }
}
