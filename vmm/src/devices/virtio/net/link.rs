//! What the threads of one interface share: the tap, and what the driver has said of it.

use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::MacAddress;
use super::tap::{HEADER, Tap};
use super::{announce, features};
use crate::devices::virtio::Notify;

/// Bits of the configuration's status (VIRTIO 1.2, 5.1.4).
const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

/// What changes while the interface works.
#[derive(Debug, Default)]
struct State {
    /// Who is told of changes, between activation and its end.
    notify: Option<Arc<dyn Notify>>,
    /// Features that have been agreed on.
    features: u64,
    /// The tap has gone.
    is_lost: bool,
    /// The guest has come from elsewhere, which is to be announced.
    is_new_here: bool,
    /// The driver has been asked to announce its guest, and has not said that it has.
    is_announcing: bool,
    /// Pairs of queues that the driver uses.
    pairs: u16,
    /// What the driver has turned off and on, or whatever was agreed on.
    offloads: Option<u64>,
}

/// The cable between guest and tap.
#[derive(Debug)]
pub(super) struct Link {
    tap: Arc<Tap>,
    mac: MacAddress,
    state: Mutex<State>,
}

/// What was said by the driver and to it, to be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Pairs of queues in use.
    pub(super) pairs: u16,
    /// What it has turned off and on.
    pub(super) offloads: Option<u64>,
    /// It has been asked to announce its guest, and has not said that it has.
    pub(super) is_announcing: bool,
}

impl Default for Agreed {
    fn default() -> Self {
        Self { pairs: 1, offloads: None, is_announcing: false }
    }
}

impl Link {
    pub(super) fn new(tap: Arc<Tap>, mac: MacAddress) -> Self {
        let state = State { pairs: 1, ..State::default() };
        Self { tap, mac, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// The status register.
    pub(super) fn status(&self) -> u16 {
        let state = self.lock();
        let bit = |is_set: bool, bit: u16| if is_set { bit } else { 0 };
        bit(!state.is_lost, S_LINK_UP) | bit(state.is_announcing, S_ANNOUNCE)
    }

    /// The driver has come, and these features are agreed on. What it has said before a migration holds.
    pub(super) fn begin(&self, features: u64, notify: Arc<dyn Notify>) {
        let mut state = self.lock();
        state.features = features;
        state.notify = Some(notify);
        self.apply(&state);
    }

    /// The driver has gone.
    pub(super) fn end(&self) {
        let Agreed { pairs, offloads, .. } = Agreed::default();
        let mut state = self.lock();
        *state = State { is_lost: state.is_lost, pairs, offloads, ..State::default() };
    }

    pub(super) fn agreed(&self) -> Agreed {
        let state = self.lock();
        Agreed { pairs: state.pairs, offloads: state.offloads, is_announcing: state.is_announcing }
    }

    /// The guest comes from elsewhere, where this was agreed on.
    pub(super) fn arrive(&self, agreed: Agreed) {
        let mut state = self.lock();
        (state.pairs, state.offloads, state.is_announcing) = (agreed.pairs, agreed.offloads, agreed.is_announcing);
        state.is_new_here = true;
    }

    /// Has the tap do what was agreed on. A tap that refuses has gone, which shows when it is read.
    fn apply(&self, state: &State) {
        let offloads = state.offloads.unwrap_or(state.features);
        let offload = features::tap_offload(features::offloads_of(offloads));
        let applied = self.tap.set_offload(offload).and_then(|()| self.tap.attach(state.pairs.into()));
        if let Err(e) = applied {
            tracing::debug!("the tap '{}' does not do what the driver has chosen: {e}", self.tap.name());
        }
    }

    /// The driver uses this many pairs of queues.
    pub(super) fn set_pairs(&self, pairs: u16) {
        let mut state = self.lock();
        state.pairs = pairs;
        self.apply(&state);
    }

    /// The driver takes frames like this from now on; whether that was agreed on.
    pub(super) fn set_offloads(&self, offloads: u64) -> bool {
        let mut state = self.lock();
        if offloads & !features::offloads_of(state.features) != 0 {
            return false;
        }
        state.offloads = Some(offloads);
        self.apply(&state);
        true
    }

    /// The tap has gone: the link is down, and the guest goes on.
    pub(super) fn lose(&self, cause: &io::Error) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.is_lost, true) {
            return;
        }
        tracing::warn!(
            "the tap '{}' has gone ({cause}): the guest's link is down, and the guest goes on; start it anew, or migrate it, to give it another tap",
            self.tap.name()
        );
        let notify = state.notify.clone();
        drop(state);
        if let Some(notify) = notify {
            notify.config();
        }
    }

    /// Whether the tap has gone.
    pub(super) fn is_lost(&self) -> bool {
        self.lock().is_lost
    }

    /// Whether the guest has come from elsewhere, which is to be announced: once, by whoever asks.
    pub(super) fn take_new_here(&self) -> bool {
        std::mem::take(&mut self.lock().is_new_here)
    }

    /// Tells the network where the guest is: by a frame in its name and, where its driver can do it, by asking it to
    /// (`VIRTIO_NET_S_ANNOUNCE`, 5.1.6.5.4). It knows what a frame of ours does not: its protocols' addresses, and its VLANs.
    pub(super) fn announce(&self) {
        if let Some(queue) = self.tap.queue(0) {
            // One of several; and whatever is wrong with the tap shows where it is waited for.
            let _ = rustix::io::writev(queue, &[IoSlice::new(&[0; HEADER]), IoSlice::new(&announce::frame(self.mac))]);
        }
        let mut state = self.lock();
        // The answer comes over the control queue.
        let can_announce =
            [features::GUEST_ANNOUNCE, features::CTRL_VQ].iter().all(|bit| state.features >> bit & 1 == 1);
        let Some(notify) = state.notify.clone().filter(|_| can_announce) else { return };
        state.is_announcing = true;
        drop(state);
        notify.config();
    }

    /// The driver has sent its announcement.
    pub(super) fn end_announcement(&self) {
        self.lock().is_announcing = false;
    }
}
