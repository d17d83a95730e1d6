//! Randomness (VIRTIO 1.2, 5.4): the host's, in as many bytes as the guest asks for, within bounds.

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};

use super::{Activation, Buffers, DeviceFault, Events, Handler, VirtioDevice, Worker, Workers};
use crate::devices::host::Host;
use crate::devices::{DeviceDescription, DeviceError};
use crate::ram::GuestRam;

/// What it is called in the table of devices.
pub const KIND: &str = "virtio-rng";
/// Its type.
const TYPE: u32 = 4;
/// The one queue, of buffers to fill.
const QUEUE: u16 = 0;
const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes that a buffer is given: a guest that asks for more asks again.
const MOST: u64 = 64 << 10;
/// How many bytes are made at once.
const PIECE: u64 = 4096;

/// A source of randomness.
#[derive(Debug)]
struct VirtioRng {
    description: DeviceDescription,
    workers: Workers,
}

/// The device of this description.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    _: &mut Host,
) -> Result<Arc<dyn VirtioDevice>, DeviceError> {
    Ok(Arc::new(VirtioRng { description: description.clone(), workers: Workers::default() }))
}

impl VirtioDevice for VirtioRng {
    fn device_type(&self) -> u32 {
        TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceFault> {
        let serving = Serving(activation.clone());
        self.workers.set([Worker::new(self.description.id.as_str(), &activation, &activation.queues, serving)?]);
        Ok(())
    }

    fn workers(&self) -> &Workers {
        &self.workers
    }
}

struct Serving(Activation);

impl Handler for Serving {
    fn queue(&mut self, index: u16, _: &Events) -> Result<(), DeviceFault> {
        let Activation { ram, notify, queues, .. } = &self.0;
        let mut queue = queues[usize::from(index)].lock(ram, notify.as_ref());
        if !queue.is_ready() {
            return Ok(());
        }
        while let Some(mut chain) = queue.pop()? {
            let written = fill(ram, chain.writable.split_to(MOST))?;
            queue.push(chain.head, written)?;
        }
        queue.notify()
    }
}

/// Fills the buffers, and gives how many bytes they have.
fn fill(ram: &GuestRam, mut buffers: Buffers) -> Result<u32, DeviceFault> {
    let mut piece = [0; PIECE as usize];
    let mut written = 0;
    while !buffers.is_empty() {
        let place = buffers.split_to(PIECE);
        let bytes = &mut piece[..place.len() as usize];
        random(bytes).map_err(|cause| DeviceFault::Host { what: "getrandom", cause })?;
        let copied = place.write(ram, bytes);
        written += copied.map_err(|e| DeviceFault::Queue { queue: QUEUE, why: e.to_string() })?;
    }
    Ok(written as u32)
}

fn random(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => bytes = &mut bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing::{Driver, Notified, activation};
    use super::*;
    use crate::devices::table;

    const BUFFER: u64 = 0x10_0000;

    /// A device whose driver has one queue, at work.
    fn rng() -> (VirtioRng, Driver, Arc<Notified>) {
        let driver = Driver::new(&Arc::new(GuestRam::new(4 << 20).unwrap()), 0, 64, 0);
        let rng = VirtioRng { description: table::describe("rng0", KIND).unwrap(), workers: Workers::default() };
        let (activation, notified) = activation(&[&driver], 0);
        rng.activate(activation).unwrap();
        rng.resume();
        (rng, driver, notified)
    }

    fn bytes(driver: &Driver, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        driver.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    #[test]
    fn buffers_are_filled_and_nothing_behind_them() {
        let (_rng, mut driver, notified) = rng();
        driver.add(&[], &[(BUFFER, 100), (BUFFER + 0x1000, 5000)]);
        driver.kick();
        assert_eq!(driver.used(), Some((0, 5100)));
        let zeros = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == 0).count();
        assert!(zeros(&bytes(&driver, BUFFER, 100)) < 20 && zeros(&bytes(&driver, BUFFER + 0x1000, 5000)) < 200);
        assert_eq!(zeros(&bytes(&driver, BUFFER + 100, 0xf9c)), 0xf9c);
        driver.add(&[(BUFFER, 8)], &[]);
        driver.add(&[], &[(BUFFER, 3 << 20)]);
        driver.kick();
        assert_eq!([driver.used(), driver.used()], [Some((2, 0)), Some((3, 64 << 10))], "so much and no more");
        assert!(notified.faults().is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_chain_does_harm(raw in prop::collection::vec(
            (prop_oneof![0..4_u64 << 20, any::<u64>()], prop_oneof![0..5000_u32, any::<u32>()], 0..8_u16, 0..20_u16), 1..16)) {
            let (rng, mut driver, notified) = rng();
            for (index, raw) in raw.iter().enumerate() {
                driver.write_descriptor(index as u16, *raw);
            }
            driver.offer(0);
            driver.kick();
            let is_answered = |driver: &mut Driver| driver.try_used().is_some() || !notified.faults().is_empty();
            while !is_answered(&mut driver) {
                std::thread::yield_now();
            }
            rng.deactivate();
            while rng.is_active() {
                std::thread::yield_now();
            }
        }
    }
}
