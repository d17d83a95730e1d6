//! What the threads of one interface share: the tap, and what the driver has said of it.

use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::MacAddress;
use super::features;
use super::tap::{HEADER, Tap};
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
    /// The guest has come from elsewhere, of which nobody on this network knows yet.
    is_new_here: bool,
    /// The driver has been asked to send an announcement.
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

/// What the driver has said, to be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Pairs of queues in use.
    pub(super) pairs: u16,
    /// What it has turned off and on.
    pub(super) offloads: Option<u64>,
}

impl Default for Agreed {
    fn default() -> Self {
        Self { pairs: 1, offloads: None }
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
        let Agreed { pairs, offloads } = Agreed::default();
        let mut state = self.lock();
        *state = State { is_lost: state.is_lost, pairs, offloads, ..State::default() };
    }

    pub(super) fn agreed(&self) -> Agreed {
        let state = self.lock();
        Agreed { pairs: state.pairs, offloads: state.offloads }
    }

    /// The guest comes from elsewhere, where this was agreed on.
    pub(super) fn arrive(&self, agreed: Agreed) {
        let mut state = self.lock();
        (state.pairs, state.offloads, state.is_new_here) = (agreed.pairs, agreed.offloads, true);
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

    /// Has the network know where the guest is now: by its driver if it can, or else by a frame in its name, as QEMU does.
    pub(super) fn announce(&self) {
        let mut state = self.lock();
        if !std::mem::take(&mut state.is_new_here) {
            return;
        }
        let notify = state.notify.clone().filter(|_| state.features >> features::GUEST_ANNOUNCE & 1 == 1);
        let Some(notify) = notify else { return self.send_announcement() };
        state.is_announcing = true;
        drop(state);
        notify.config();
    }

    /// The driver has sent its announcement.
    pub(super) fn end_announcement(&self) {
        self.lock().is_announcing = false;
    }

    fn send_announcement(&self) {
        let Some(queue) = self.tap.queue(0) else { return };
        let frame = announcement(self.mac);
        // One of many that may be lost.
        let _ = rustix::io::writev(queue, &[IoSlice::new(&[0; HEADER]), IoSlice::new(&frame)]);
    }
}

/// A reverse ARP request, which every switch hears and nobody answers (RFC 903).
fn announcement(mac: MacAddress) -> [u8; 60] {
    let mac = mac.bytes();
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // Reverse ARP; Ethernet, IPv4, lengths of their addresses; request.
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}
