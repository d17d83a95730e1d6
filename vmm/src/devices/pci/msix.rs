//! MSI-X (PCI Local Bus Specification 3.0, 6.8.2): a table of messages with a mask each, and the bits of those that are pending
//! because they are masked.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::{Deserialize, Serialize};

use crate::bounded::at_most;
use crate::devices::host::{Message, MessageInterrupts};
use crate::log_limit::LogLimit;
use crate::record::Name;

/// The capability's id.
pub(in crate::devices) const CAPABILITY: u8 = 0x11;
/// Bits of the capability's message control that can be written: enable, and the mask of all.
pub(in crate::devices) const CONTROL_ENABLE: u16 = 1 << 15;
pub(in crate::devices) const CONTROL_MASK: u16 = 1 << 14;
pub(in crate::devices) const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_MASK;

/// Bytes of an entry of the table: address, data, vector control.
const ENTRY: usize = 16;
const ENTRY_CONTROL: usize = 12;
/// Vectors of a function, at most: a page of table.
pub(in crate::devices) const MAX_VECTORS: usize = 256;
const TABLE: usize = MAX_VECTORS * ENTRY;
const PENDING_WORDS: usize = MAX_VECTORS / 64;

/// What is saved of it besides message control, which is in configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMsix {
    /// The table, 16 bytes an entry.
    #[serde(deserialize_with = "at_most::<_, _, TABLE>")]
    pub table: Vec<u8>,
    /// The pending bits, 64 a word.
    #[serde(deserialize_with = "at_most::<_, _, PENDING_WORDS>")]
    pub pending: Vec<u64>,
}

#[derive(Debug)]
struct State {
    table: Vec<u8>,
    control: u16,
}

impl State {
    fn new(vectors: u16) -> Self {
        let mut table = vec![0; usize::from(vectors) * ENTRY];
        // Every vector is masked.
        table.iter_mut().skip(ENTRY_CONTROL).step_by(ENTRY).for_each(|control| *control = 1);
        Self { table, control: 0 }
    }

    fn is_enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// The message of a vector, if nothing masks it.
    fn message(&self, vector: u16) -> Option<Message> {
        let entry = self.table.chunks_exact(ENTRY).nth(vector.into())?;
        let dword = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let is_masked = !self.is_enabled() || self.control & CONTROL_MASK != 0 || entry[ENTRY_CONTROL] & 1 != 0;
        let address = u64::from(dword(0)) | u64::from(dword(4)) << 32;
        (!is_masked).then(|| Message { address, data: dword(8) })
    }
}

/// The vectors of one function. Whoever raises one holds the state shared; whoever masks one, alone.
#[derive(Debug)]
pub struct Msix {
    id: Name,
    vectors: u16,
    state: RwLock<State>,
    pending: Vec<AtomicU64>,
    interrupts: Arc<dyn MessageInterrupts>,
    log: Mutex<LogLimit>,
}

impl Msix {
    /// Those of the device `id`, `vectors` of them, 256 at most, with these interrupts.
    pub fn new(id: &Name, vectors: u16, interrupts: Arc<dyn MessageInterrupts>) -> Self {
        let pending = (0..vectors.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let state = RwLock::new(State::new(vectors));
        Self { id: id.clone(), vectors, state, pending, interrupts, log: Mutex::default() }
    }

    /// How many there are.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    fn shared(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest has enabled it.
    pub fn is_enabled(&self) -> bool {
        self.shared().is_enabled()
    }

    /// Raises a vector: at once, when it is unmasked, or never, when the guest has not enabled MSI-X.
    pub fn trigger(&self, vector: u16) {
        let state = self.shared();
        if !state.is_enabled() || vector >= self.vectors {
            return;
        }
        match state.message(vector) {
            Some(_) => self.send(vector),
            None => {
                let (word, bit) = self.place(vector);
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    fn place(&self, vector: u16) -> (&AtomicU64, u64) {
        (&self.pending[usize::from(vector / 64)], 1 << (vector % 64))
    }

    fn send(&self, vector: u16) {
        self.interrupts.trigger(vector).unwrap_or_else(|e| self.complain(&e));
    }

    fn complain(&self, cause: &std::io::Error) {
        if self.log.lock().unwrap_or_else(PoisonError::into_inner).is_due() {
            tracing::warn!("an interrupt of the device '{}' may be lost: {cause}", self.id);
        }
    }

    /// Routes those of `vectors` that are unmasked, and sends what is pending of them.
    fn deliver(&self, state: &State, vectors: impl Iterator<Item = u16>) {
        let unmasked: Vec<_> = vectors.filter_map(|vector| Some((vector, state.message(vector)?))).collect();
        if unmasked.is_empty() {
            return;
        }
        if let Err(e) = self.interrupts.route(&unmasked) {
            return self.complain(&e);
        }
        for (vector, _) in unmasked {
            let (word, bit) = self.place(vector);
            if word.fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
                self.send(vector);
            }
        }
    }

    /// Routes every unmasked vector, and sends what is pending: the machine goes on, perhaps on another host.
    pub fn resume(&self) {
        self.deliver(&self.shared(), 0..self.vectors);
    }

    /// The guest has written this message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.alone();
        if state.control != control {
            state.control = control;
            self.deliver(&state, 0..self.vectors);
        }
    }

    /// Fills `data` from the table at `offset`; with zeros behind its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared();
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = state.table.get(at).copied().unwrap_or(0);
        }
    }

    /// Takes `data` for the table at `offset`.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.alone();
        let offset = offset as usize;
        for (byte, at) in data.iter().zip(offset..) {
            let Some(place) = state.table.get_mut(at) else { break };
            // Of vector control, there is the mask alone.
            *place = match at % ENTRY {
                ..ENTRY_CONTROL => *byte,
                ENTRY_CONTROL => byte & 1,
                _ => 0,
            };
        }
        let first = (offset / ENTRY).min(self.vectors.into()) as u16;
        let last = ((offset + data.len()).div_ceil(ENTRY)).min(self.vectors.into()) as u16;
        self.deliver(&state, first..last);
    }

    /// Fills `data` from the pending bits at `offset`; with zeros behind their end.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            let word = self.pending.get(at / 8).map_or(0, |word| word.load(Ordering::SeqCst));
            *byte = word.to_le_bytes()[at % 8];
        }
    }

    /// Back to what it was at the start.
    pub fn reset(&self) {
        *self.alone() = State::new(self.vectors);
        self.pending.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// What is saved of it.
    pub fn save(&self) -> SavedMsix {
        let pending = self.pending.iter().map(|word| word.load(Ordering::SeqCst)).collect();
        SavedMsix { table: self.shared().table.clone(), pending }
    }

    /// Why it cannot become what was saved: the end of a sentence.
    ///
    /// # Errors
    /// When it has another number of vectors.
    pub fn check(&self, saved: &SavedMsix) -> Result<(), String> {
        if saved.table.len() != usize::from(self.vectors) * ENTRY || saved.pending.len() != self.pending.len() {
            let found = saved.table.len() / ENTRY;
            return Err(format!("it has a table of {found} interrupt vectors, here there are {}", self.vectors));
        }
        Ok(())
    }

    /// Becomes what was saved, which [`Msix::check`] has seen, with this message control. Nothing is routed before [`Msix::resume`].
    pub fn restore(&self, saved: &SavedMsix, control: u16) {
        self.reset();
        self.write_table(0, &saved.table);
        for (word, bits) in self.pending.iter().zip(&saved.pending) {
            word.store(*bits, Ordering::SeqCst);
        }
        self.alone().control = control;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::devices::testing::FakeVm;

    const ON: u16 = CONTROL_ENABLE;

    fn msix(vectors: u16) -> (Msix, Arc<FakeVm>) {
        let vm = Arc::new(FakeVm::default());
        let interrupts = crate::devices::host::Interrupts::messages(vm.as_ref(), vectors).unwrap();
        (Msix::new(&"rng0".try_into().unwrap(), vectors, interrupts), vm)
    }

    fn entry(vector: u32, masked: u32) -> Vec<u8> {
        [0xfee0_0000, 0, vector, masked].map(u32::to_le_bytes).concat()
    }

    fn pending(msix: &Msix) -> u64 {
        let mut bytes = [0; 8];
        msix.read_pending(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn what_is_masked_waits_for_its_unmasking() {
        let (msix, vm) = msix(3);
        msix.trigger(0);
        assert_eq!((pending(&msix), vm.sent()), (0, vec![]), "MSI-X is off");
        msix.set_control(ON | CONTROL_MASK);
        msix.write_table(16, &entry(0x41, 0));
        msix.trigger(1);
        assert_eq!((pending(&msix), vm.sent()), (0b10, vec![]));
        msix.set_control(ON);
        assert_eq!((pending(&msix), vm.sent()), (0, vec![0x41]));
        msix.write_table(28, &1_u32.to_le_bytes());
        msix.trigger(1);
        msix.trigger(2);
        msix.trigger(7);
        assert_eq!((pending(&msix), vm.sent()), (0b110, vec![0x41]));
        msix.write_table(24, &[0x52]);
        msix.write_table(28, &0_u32.to_le_bytes());
        assert_eq!((pending(&msix), vm.sent()), (0b100, vec![0x41, 0x52]));
        assert_eq!(vm.routings(), 2, "one whenever something changes");
    }

    #[test]
    fn what_is_saved_is_pending_elsewhere() {
        let (msix, _) = super::tests::msix(2);
        msix.set_control(ON | CONTROL_MASK);
        msix.write_table(0, &[entry(0x41, 0), entry(0x52, 0)].concat());
        msix.trigger(1);
        let saved = msix.save();
        let (other, vm) = super::tests::msix(2);
        other.check(&saved).unwrap();
        other.restore(&saved, ON);
        assert_eq!((other.save(), vm.routings()), (saved.clone(), 0));
        other.resume();
        assert_eq!((vm.sent(), vm.routings()), (vec![0x52], 1), "both are routed at once");
        assert!(super::tests::msix(3).0.check(&saved).is_err());
    }

    proptest! {
        #[test]
        fn it_sends_each_once_as_a_list_of_entries_would(
            steps in prop::collection::vec((0..5_u8, 0..3_u16, any::<bool>(), any::<bool>()), 0..80)) {
            let (msix, vm) = msix(3);
            let (mut enabled, mut all, mut masked, mut waits) = (false, false, [true; 3], [false; 3]);
            let mut naive = Vec::new();
            (0..3).for_each(|vector| msix.write_table(16 * vector, &entry(vector as u32 + 1, 1)));
            for (step, vector, one, two) in steps {
                let index = usize::from(vector);
                match step {
                    0 => {
                        (enabled, all) = (one, two);
                        msix.set_control(u16::from(one) << 15 | u16::from(two) << 14);
                    }
                    1 => {
                        masked[index] = one;
                        msix.write_table(16 * u64::from(vector) + 12, &u32::from(one).to_le_bytes());
                    }
                    _ => {
                        waits[index] |= enabled;
                        msix.trigger(vector);
                    }
                }
                for vector in 0..3 {
                    if waits[vector] && enabled && !all && !masked[vector] {
                        waits[vector] = false;
                        naive.push(vector as u32 + 1);
                    }
                }
                prop_assert_eq!(pending(&msix), (0..3).map(|v| u64::from(waits[v]) << v).sum::<u64>());
                prop_assert_eq!(vm.sent(), naive.clone());
            }
        }

        #[test]
        fn no_access_does_harm(accesses in prop::collection::vec((0..0x1100_u64, any::<[u8; 8]>(), 1..9_usize), 0..40)) {
            let (msix, _) = msix(5);
            msix.set_control(ON);
            for (offset, mut bytes, width) in accesses {
                msix.write_table(offset, &bytes[..width]);
                msix.read_table(offset, &mut bytes[..width]);
                msix.read_pending(offset, &mut bytes[..width]);
            }
        }
    }
}
