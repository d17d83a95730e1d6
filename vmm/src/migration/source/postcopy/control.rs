//! What whoever controls this monitor sees of post-copy, and can do about it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::migration::channels::Channels;
use crate::migration::link::Address;

/// How the other side is reached again, and what people are told meanwhile; shared with whoever controls this monitor.
#[derive(Debug)]
pub struct PostCopyControl {
    /// Where the channels come together.
    pub channels: Channels,
    address: Mutex<Option<Address>>,
    left: AtomicU64,
    connected: AtomicBool,
    /// The destination has said, or shown by coming back, that the guest is its own.
    confirmed: AtomicBool,
}

impl PostCopyControl {
    /// For a migration to `address`, if it has one.
    pub fn new(channels: Channels, address: Option<Address>) -> Self {
        Self {
            channels,
            address: Mutex::new(address),
            left: AtomicU64::new(0),
            connected: AtomicBool::new(true),
            confirmed: AtomicBool::new(false),
        }
    }

    /// Pages of a guest that runs elsewhere which are only here.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// Whether they are on their way.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::SeqCst)
    }

    /// Whether the guest is known to be the destination's. Until then all of it is here as well.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::SeqCst)
    }

    /// The destination has said that the guest runs there.
    pub(super) fn confirm(&self) {
        self.confirmed.store(true, Ordering::SeqCst);
    }

    /// So many pages are only here.
    pub(super) fn keeps(&self, pages: u64) {
        self.left.store(pages, Ordering::SeqCst);
    }

    /// Whether there is a connection now.
    pub(super) fn has_connection(&self, has: bool) {
        self.connected.store(has, Ordering::SeqCst);
    }

    /// From now on the other side is tried here.
    pub fn set_address(&self, address: Address) {
        *self.lock() = Some(address);
    }

    /// Where the other side is tried.
    pub fn address(&self) -> Option<Address> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Address>> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
