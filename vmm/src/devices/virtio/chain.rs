//! A descriptor chain, checked whole before anybody uses a byte of it.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::DeviceFault;
use crate::ram::{GuestMemory, GuestRam};

/// Most buffers of a chain; what other monitors take too (QEMU, `VIRTQUEUE_MAX_SIZE`).
pub(super) const MAX_BUFFERS: usize = 1024;

/// Part of guest RAM with its log of the monitor's own writes.
pub type RamSlice<'a> = VolatileSlice<'a, vm_memory::bitmap::BS<'a, vm_memory::bitmap::AtomicBitmap>>;

/// Consecutive buffers of a chain, all of one direction, each wholly in one region of RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    parts: Vec<(GuestAddress, u32)>,
    bytes: u64,
}

impl Buffers {
    /// Number of bytes in all of them: fewer than 2^32.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Address and length in bytes of each.
    pub fn parts(&self) -> &[(GuestAddress, u32)] {
        &self.parts
    }

    /// Each as a slice of guest RAM; writes through one are logged.
    ///
    /// # Errors
    /// None for buffers of this machine's RAM.
    pub fn slices<'a>(
        &'a self,
        ram: &'a GuestRam,
    ) -> impl Iterator<Item = Result<RamSlice<'a>, vm_memory::GuestMemoryError>> + 'a {
        self.parts.iter().map(|(address, length)| ram.memory().get_slice(*address, *length as usize))
    }

    /// Takes the first `bytes` off, or all there are.
    #[must_use]
    pub fn split_to(&mut self, bytes: u64) -> Self {
        let mut front = Self::default();
        let mut rest = Self::default();
        for (address, length) in std::mem::take(self).parts {
            let here = u64::from(length).min(bytes - front.bytes) as u32;
            front.push(address, here);
            rest.push(GuestAddress(address.0 + u64::from(here)), length - here);
        }
        *self = rest;
        front
    }

    /// Copies from the first buffers into `bytes`, and gives how many there were.
    ///
    /// # Errors
    /// None for buffers of this machine's RAM.
    pub fn read(&self, ram: &GuestRam, bytes: &mut [u8]) -> Result<usize, vm_memory::GuestMemoryError> {
        let mut done = 0;
        for (address, length) in &self.parts {
            let place = &mut bytes[done..];
            let here = place.len().min(*length as usize);
            ram.memory().read_slice(&mut place[..here], *address)?;
            done += here;
        }
        Ok(done)
    }

    /// Copies `bytes` into the first buffers, and gives how many found room.
    ///
    /// # Errors
    /// None for buffers of this machine's RAM.
    pub fn write(&self, ram: &GuestRam, bytes: &[u8]) -> Result<usize, vm_memory::GuestMemoryError> {
        let mut done = 0;
        for (address, length) in &self.parts {
            let rest = &bytes[done..];
            let here = rest.len().min(*length as usize);
            ram.memory().write_slice(&rest[..here], *address)?;
            done += here;
        }
        Ok(done)
    }

    fn clear(&mut self) {
        self.parts.clear();
        self.bytes = 0;
    }

    fn push(&mut self, address: GuestAddress, length: u32) {
        if length > 0 {
            self.parts.push((address, length));
            self.bytes += u64::from(length);
        }
    }
}

/// What a driver offers at once: buffers the device reads, then buffers it writes (VIRTIO 1.2, 2.7.4.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Index of its first descriptor, by which it is given back.
    pub head: u16,
    /// What the device may read.
    pub readable: Buffers,
    /// What the device may write.
    pub writable: Buffers,
}

impl Chain {
    /// Becomes the one of these descriptors: walks them and checks each. Takes no memory where the chain before was no shorter.
    ///
    /// # Errors
    /// When the chain does not end, leaves RAM, has 2^32 bytes or more, or a buffer to read behind one to write.
    pub(super) fn walk<M>(
        &mut self,
        queue: u16,
        ram: &GuestRam,
        descriptors: DescriptorChain<M>,
    ) -> Result<(), DeviceFault>
    where
        M: Deref<Target = GuestMemory>,
    {
        let head = descriptors.head_index();
        let wrong = |why: String| DeviceFault::Queue { queue, why: format!("the chain at descriptor {head} {why}") };
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        // virtio-queue ends a walk that cannot go on without a word; the last descriptor then says that another follows.
        let mut goes_on = true;
        for (number, descriptor) in descriptors.enumerate() {
            if number == MAX_BUFFERS {
                return Err(wrong(format!("has more than {MAX_BUFFERS} buffers")));
            }
            goes_on = descriptor.has_next();
            let (address, length) = (descriptor.addr(), descriptor.len());
            if length > 0 && ram.memory().get_slice(address, length as usize).is_err() {
                return Err(wrong(format!("has {length} bytes at {:#x}, which are not all RAM", address.0)));
            }
            if descriptor.is_write_only() {
                self.writable.push(address, length);
            } else if self.writable.is_empty() {
                self.readable.push(address, length);
            } else {
                return Err(wrong("has a buffer to read behind one to write".into()));
            }
        }
        if goes_on { Err(wrong("does not end, or leads nowhere".into())) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::testing::{Driver, INDIRECT, NEXT, Raw, WRITE, activation};
    use super::*;

    const RAM: u64 = 1 << 20;

    fn pop(driver: &Driver) -> Result<Option<Chain>, DeviceFault> {
        let (activation, _) = activation(&[driver], 0);
        driver.queue.lock(&activation.ram, activation.notify.as_ref()).pop()
    }

    fn driver() -> Driver {
        Driver::new(&Arc::new(GuestRam::new(RAM).unwrap()), 0, 16, 0)
    }

    fn refused(descriptors: &[Raw]) -> String {
        let mut driver = driver();
        for (index, raw) in descriptors.iter().enumerate() {
            driver.write_descriptor(index as u16, *raw);
        }
        driver.offer(0);
        pop(&driver).unwrap_err().to_string()
    }

    #[test]
    fn buffers_to_read_come_before_those_to_write() {
        let mut driver = driver();
        driver.add(&[(0x8000, 16), (0x9000, 0), (0xa000, 4)], &[(0xb000, 1)]);
        let chain = pop(&driver).unwrap().unwrap();
        assert_eq!(chain.readable.parts(), [(GuestAddress(0x8000), 16), (GuestAddress(0xa000), 4)]);
        assert_eq!((chain.readable.len(), chain.writable.len()), (20, 1));
        assert!(pop(&driver).unwrap().is_none());
    }

    #[test]
    fn what_no_chain_can_be_is_refused() {
        for (descriptors, words) in [
            (&[(0x8000, 1, WRITE | NEXT, 1), (0x9000, 1, 0, 0)][..], "behind one to write"),
            (&[(0x8000, 1, NEXT, 0)], "does not end"),
            (&[(0x8000, 1, NEXT, 16)], "does not end"),
            (&[(RAM - 1, 2, 0, 0)], "not all RAM"),
            (&[(u64::MAX, 2, 0, 0)], "not all RAM"),
            (&[(0x8000, 24, INDIRECT, 0)], "leads nowhere"),
            (&[(RAM, 32, INDIRECT, 0)], "leads nowhere"),
            (&[(0, u32::MAX, 0, 0)], "not all RAM"),
        ] {
            let why = refused(descriptors);
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn an_indirect_table_in_an_indirect_table_is_refused() {
        let mut driver = driver();
        driver.write_descriptor_at(0x8000, (0x9000, 16, INDIRECT, 0));
        driver.write_descriptor(0, (0x8000, 16, INDIRECT, 0));
        driver.offer(0);
        assert!(pop(&driver).is_err());
    }

    #[test]
    fn a_chain_of_very_many_buffers_is_refused() {
        let mut driver = driver();
        for number in 0..2000 {
            driver.write_descriptor_at(0x8000 + 16 * number, (0, 1, NEXT, number as u16 + 1));
        }
        driver.write_descriptor(0, (0x8000, 2000 * 16, INDIRECT, 0));
        driver.offer(0);
        assert!(pop(&driver).unwrap_err().to_string().contains("more than 1024 buffers"));
    }

    fn buffers() -> impl Strategy<Value = Vec<(u64, u32)>> {
        prop::collection::vec((0x8000..RAM - 5000, 0..5000_u32), 0..7)
    }

    proptest! {
        #[test]
        fn buffers_are_split_as_bytes_are(parts in buffers(), at in 0..40_000_u64) {
            let ram = GuestRam::new(RAM).unwrap();
            let mut whole = Buffers::default();
            parts.iter().for_each(|(address, length)| whole.push(GuestAddress(*address), *length));
            let mut rest = whole.clone();
            let front = rest.split_to(at);
            prop_assert_eq!(front.len(), at.min(whole.len()));
            prop_assert_eq!(front.len() + rest.len(), whole.len());
            let bytes = |buffers: &Buffers| -> Vec<u64> {
                buffers.parts().iter().flat_map(|(a, n)| (0..u64::from(*n)).map(|i| a.0 + i)).collect()
            };
            prop_assert_eq!([bytes(&front), bytes(&rest)].concat(), bytes(&whole));
            prop_assert_eq!(whole.slices(&ram).map(|slice| slice.unwrap().len() as u64).sum::<u64>(), whole.len());
        }

        #[test]
        fn no_descriptors_do_harm(raw in prop::collection::vec(
            (prop_oneof![0..RAM, any::<u64>()], prop_oneof![0..64_u32, any::<u32>()], 0..8_u16, 0..20_u16), 16)) {
            let mut driver = driver();
            for (index, raw) in raw.iter().enumerate() {
                driver.write_descriptor(index as u16, *raw);
            }
            driver.offer(0);
            if let Ok(Some(chain)) = pop(&driver) {
                for (address, length) in chain.readable.parts().iter().chain(chain.writable.parts()) {
                    prop_assert!(address.0 + u64::from(*length) <= RAM);
                }
            }
        }
    }
}
