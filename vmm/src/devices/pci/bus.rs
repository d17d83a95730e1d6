//! Which function answers where.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::arch::x86_64::layout::PCI_WINDOW;

/// Devices of a bus.
const SLOTS: usize = 32;

/// A function on the bus, its device's only one.
pub trait PciFunction: Send + Sync + Debug {
    /// Fills `data` from its configuration space at `offset`, which is below 4096.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Takes `data` for its configuration space at `offset`, as [`PciFunction::read_config`].
    fn write_config(&self, offset: usize, data: &[u8]);

    /// The BAR that it decodes at the guest physical `address`, and the offset in it. Asked at every access to the window: it waits for
    /// nothing.
    fn decode(&self, address: u64) -> Option<(usize, u64)>;

    /// Fills `data` from the registers behind a BAR at `offset`.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Takes `data` for the registers behind a BAR at `offset`.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);
}

/// Bus 0: its functions by slot, and what is free of the window for BARs.
#[derive(Debug)]
pub struct PciBus {
    functions: RwLock<Vec<Arc<dyn PciFunction>>>,
    free: Mutex<u64>,
}

impl Default for PciBus {
    fn default() -> Self {
        Self { functions: RwLock::default(), free: Mutex::new(PCI_WINDOW.start) }
    }
}

impl PciBus {
    /// Puts a function into the next slot. `None` when there is no more.
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Option<usize> {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        (functions.len() < SLOTS).then(|| {
            functions.push(function);
            functions.len() - 1
        })
    }

    fn free(&self) -> MutexGuard<'_, u64> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An address in the window for a BAR of `size` bytes, a power of two: where it is when the machine starts. `None` when the window is
    /// full.
    pub fn allocate(&self, size: u32) -> Option<u32> {
        let mut free = self.free();
        let start = free.next_multiple_of(size.into());
        let end = start + u64::from(size);
        (end <= PCI_WINDOW.end).then(|| {
            *free = end;
            start as u32
        })
    }

    fn function(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(slot).cloned()
    }

    /// Reads configuration space of the function in `slot`: ones where there is none.
    pub fn read_config(&self, slot: usize, offset: usize, data: &mut [u8]) {
        match self.function(slot) {
            Some(function) => function.read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space of the function in `slot`.
    pub fn write_config(&self, slot: usize, offset: usize, data: &[u8]) {
        if let Some(function) = self.function(slot) {
            function.write_config(offset, data);
        }
    }

    /// Who decodes `address`: of several, the one in the lowest slot.
    fn find(&self, address: u64) -> Option<(Arc<dyn PciFunction>, usize, u64)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().find_map(|function| {
            let (bar, offset) = function.decode(address)?;
            Some((Arc::clone(function), bar, offset))
        })
    }

    /// Reads at a guest physical address in the window: ones where nobody decodes it.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((function, bar, offset)) => function.read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at a guest physical address in the window.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.find(address) {
            function.write_bar(bar, offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Has one BAR of 16 bytes, at the address of its first configuration register, and says where it was met.
    #[derive(Debug)]
    struct Echo(u8, AtomicU64);

    impl PciFunction for Echo {
        fn read_config(&self, _: usize, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write_config(&self, _: usize, data: &[u8]) {
            self.1.store(u64::from_le_bytes(data.try_into().unwrap()), Ordering::SeqCst);
        }
        fn decode(&self, address: u64) -> Option<(usize, u64)> {
            let base = self.1.load(Ordering::SeqCst);
            (base..base + 16).contains(&address).then(|| (0, address - base))
        }
        fn read_bar(&self, _: usize, offset: u64, data: &mut [u8]) {
            data.fill(self.0 << 4 | offset as u8);
        }
        fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
    }

    #[test]
    fn of_two_that_overlap_the_first_answers() {
        let bus = PciBus::default();
        for number in 1..=2 {
            assert_eq!(bus.add(Arc::new(Echo(number, AtomicU64::new(0)))), Some(usize::from(number) - 1));
        }
        let read = |address| {
            let mut byte = [0];
            bus.read_memory(address, &mut byte);
            byte[0]
        };
        bus.write_config(0, 0, &0x1000_u64.to_le_bytes());
        bus.write_config(1, 0, &0x1008_u64.to_le_bytes());
        assert_eq!(
            [read(0xfff), read(0x1000), read(0x100f), read(0x1010), read(0x1018)],
            [0xff, 0x10, 0x1f, 0x28, 0xff]
        );
        bus.write_config(0, 0, &0x2000_u64.to_le_bytes());
        assert_eq!([read(0x1008), read(0x2000)], [0x20, 0x10]);
        let mut config = [0; 2];
        bus.read_config(7, 0, &mut config);
        assert_eq!(config, [0xff; 2]);
        bus.write_config(7, 0, &[0]);
        bus.write_memory(0x5000, &[0]);
    }

    #[test]
    fn slots_and_addresses_end() {
        let bus = PciBus::default();
        let add = || bus.add(Arc::new(Echo(0, AtomicU64::new(0))));
        assert_eq!((0..SLOTS).filter_map(|_| add()).count(), SLOTS);
        assert_eq!(add(), None);
        assert_eq!(bus.allocate(0x100), Some(0xc000_0000));
        assert_eq!(bus.allocate(0x8000), Some(0xc000_8000));
        assert_eq!(bus.allocate(1 << 28), Some(0xd000_0000));
        assert_eq!(bus.allocate(16), None);
    }
}
