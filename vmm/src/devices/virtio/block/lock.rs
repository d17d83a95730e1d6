//! The lock on an image, so that no two processes write one, on this host or on others that share it.
//!
//! The bytes are QEMU's (block/file-posix.c, `RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE`): byte 100 + n locked says "I do n", and
//! byte 200 + n "nobody else may do n", where n is 0 for reading what does not change, 1 for writing, 2 for writing what is there
//! already and 3 for changing the size (include/block/block-common.h, `BLK_PERM_*`). QEMU locks each shared, and looks at
//! those of others; so it and we exclude one another. The locks are of the open file (`F_OFD_SETLK`) and need nothing of what is behind
//! the bytes: an image may be shorter.
//!
//! When a guest moves, its source and its destination both hold "I do" for a time, each shared, and nobody else can come
//! between: the source lets go of "nobody else may" before the destination takes it. Neither is ever without a lock.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::sys::{self, RangeLock};
use crate::host;

/// What whoever locks them does.
const DOES: Range<u64> = 100..200;
/// What whoever locks them lets nobody else do.
const FORBIDS: Range<u64> = 200..300;
const ALL: Range<u64> = DOES.start..FORBIDS.end;
/// Of both: reading what does not change, and all others of QEMU's.
const READS: u64 = 0;
const WRITES: Range<u64> = 1..4;

/// How often is tried to have an image alone, at first and at last.
const SOON: Duration = Duration::from_millis(10);
const LATER: Duration = Duration::from_secs(1);

/// How an image is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// Nobody else reads or writes it.
    Alone,
    /// With others that read it.
    Reading,
    /// Another process may [take](Hold::Taken) it.
    Offered,
    /// Taken from a process that offers it.
    Taken,
    /// Not at all.
    Free,
}

/// The lock on one open file.
#[derive(Debug)]
pub(super) struct ImageLock {
    file: File,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    hold: Hold,
    /// How often it was to be held otherwise.
    changes: u64,
}

impl ImageLock {
    /// Of this open file, which is not locked yet.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub(super) fn new(file: &File) -> io::Result<Arc<Self>> {
        let state = Mutex::new(State { hold: Hold::Free, changes: 0 });
        Ok(Arc::new(Self { file: file.try_clone()?, state }))
    }

    /// Holds it so from now on, if nobody else has a lock that forbids it, and says whether; else it is held as before.
    ///
    /// # Errors
    /// When the file can have no locks.
    pub(super) fn hold(&self, wanted: Hold) -> io::Result<bool> {
        let mut state = self.lock();
        state.changes += 1;
        let is_held = self.set(wanted)?;
        if is_held {
            state.hold = wanted;
        } else {
            // What was locked of it.
            self.set(state.hold)?;
        }
        Ok(is_held)
    }

    /// Whether another process says that it works with the image.
    ///
    /// # Errors
    /// When the file can have no locks.
    pub(super) fn is_used_elsewhere(&self) -> io::Result<bool> {
        sys::is_locked(&self.file, &DOES)
    }

    /// Has it alone as soon as whoever shares it now lets go. It is held as it is until then, and is tried for as long as it is
    /// held so and somebody else has a count of this.
    pub(super) fn hold_alone_soon(self: &Arc<Self>) {
        if !matches!(self.hold(Hold::Alone), Ok(false)) {
            return;
        }
        let (lock, since) = (Arc::downgrade(self), self.lock().changes);
        let again = move || {
            let mut pause = SOON;
            loop {
                std::thread::sleep(pause);
                pause = (pause * 2).min(LATER);
                let Some(lock) = lock.upgrade() else { return };
                let mut state = lock.lock();
                // Offered again, or given away.
                if state.changes != since {
                    return;
                }
                match lock.set(Hold::Alone) {
                    Ok(false) => {}
                    Ok(true) => {
                        state.hold = Hold::Alone;
                        return;
                    }
                    Err(_) => return,
                }
            }
        };
        if let Err(e) = host::thread("image-lock").and_then(|thread| thread.spawn(again)) {
            tracing::warn!("an image stays locked as while its guest moves: {e}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, hold: Hold) -> io::Result<bool> {
        let set = |lock, bytes: Range<u64>| sys::lock(&self.file, lock, &bytes);
        match hold {
            Hold::Alone => set(RangeLock::Alone, ALL),
            Hold::Reading => {
                let does = DOES.start + READS..DOES.start + READS + 1;
                let forbids = FORBIDS.start + WRITES.start..FORBIDS.start + WRITES.end;
                Ok(set(RangeLock::Shared, does)? && set(RangeLock::Shared, forbids)? && !self.is_written()?)
            }
            Hold::Offered => Ok(set(RangeLock::Shared, DOES)? && set(RangeLock::Free, FORBIDS)?),
            Hold::Taken => Ok(set(RangeLock::Alone, FORBIDS)? && set(RangeLock::Shared, DOES)?),
            Hold::Free => set(RangeLock::Free, ALL),
        }
    }

    /// Whether somebody else writes it, or lets nobody read it.
    fn is_written(&self) -> io::Result<bool> {
        let reads = FORBIDS.start + READS..FORBIDS.start + READS + 1;
        let writes = DOES.start + WRITES.start..DOES.start + WRITES.end;
        Ok(sys::is_locked(&self.file, &writes)? || sys::is_locked(&self.file, &reads)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locks<const N: usize>() -> [Arc<ImageLock>; N] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        std::array::from_fn(|_| ImageLock::new(&open()).unwrap())
    }

    fn is(lock: &ImageLock, hold: Hold) -> bool {
        lock.hold(hold).unwrap()
    }

    #[test]
    fn one_writes_or_many_read() {
        let [first, second, third] = locks();
        assert!(is(&first, Hold::Alone) && !is(&second, Hold::Alone) && !is(&second, Hold::Reading));
        assert!(is(&first, Hold::Free) && is(&second, Hold::Reading) && is(&third, Hold::Reading));
        assert!(!is(&first, Hold::Alone));
        assert!(is(&second, Hold::Free) && !is(&first, Hold::Alone) && is(&third, Hold::Free));
        assert!(is(&first, Hold::Alone), "what was refused has left a lock behind");
    }

    #[test]
    fn it_is_handed_over_and_nobody_comes_between() {
        let [source, destination, other] = locks();
        assert!(is(&source, Hold::Alone) && !is(&destination, Hold::Taken));
        assert!(destination.is_used_elsewhere().unwrap());
        let is_kept = || !is(&other, Hold::Alone) && !is(&other, Hold::Reading);
        assert!(is(&source, Hold::Offered) && is_kept());
        assert!(is(&destination, Hold::Taken) && is_kept() && !is(&other, Hold::Taken));
        assert!(!is(&source, Hold::Alone), "the destination has it");
        assert!(is(&source, Hold::Free) && is_kept());
        assert!(is(&destination, Hold::Alone) && is_kept());
    }

    #[test]
    fn a_source_that_keeps_it_has_it_alone_once_the_destination_lets_go() {
        let [source, destination] = locks();
        assert!(is(&source, Hold::Alone) && is(&source, Hold::Offered) && is(&destination, Hold::Taken));
        source.hold_alone_soon();
        assert_eq!(source.lock().hold, Hold::Offered);
        drop(destination);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while source.lock().hold != Hold::Alone {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(SOON);
        }
    }

    #[test]
    fn qemu_and_we_exclude_one_another() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let ours = ImageLock::new(&open()).unwrap();
        let locked = |bytes: &[u64]| {
            let qemu = open();
            assert!(bytes.iter().all(|byte| sys::lock(&qemu, RangeLock::Shared, &(*byte..byte + 1)).unwrap()));
            qemu
        };
        // What QEMU 7.2 locks for a disk, and for one that is read only.
        let writer = locked(&[100, 101, 201, 203]);
        assert!(!is(&ours, Hold::Alone) && !is(&ours, Hold::Reading) && !is(&ours, Hold::Taken));
        drop(writer);
        let reader = locked(&[100, 201, 203]);
        assert!(!is(&ours, Hold::Alone) && is(&ours, Hold::Reading));
        drop(reader);
        let others = open();
        let sees = |byte: u64| sys::is_locked(&others, &(byte..byte + 1)).unwrap();
        assert!(sees(201) && sees(203) && !sees(101) && !sees(200), "a writer of QEMU's is refused, a reader is not");
        assert!(is(&ours, Hold::Alone) && [101, 200, 201].into_iter().all(sees));
    }
}
