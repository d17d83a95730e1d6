//! A driver that lays whatever it wants into a device's rings, tables and buffers.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::input::Input;
use crate::devices::host::Backends;
use crate::devices::testing::FakeVm;
use crate::devices::virtio::{Activation, DeviceFault, Notify, QueueSetup, VirtioDevice, Virtqueue, inline};
use crate::devices::{DeviceDescription, table};
use crate::ram::GuestRam;

/// Most queues that are used, and most entries of one.
const QUEUES: u16 = 8;
const ENTRIES: u16 = 16;
/// Bytes from one queue's descriptors to the next one's, and where in them its rings are.
const STRIDE: u64 = 0x400;
const AVAILABLE: u64 = 0x200;
const USED: u64 = 0x280;
/// The rings' feature.
const F_EVENT_IDX: u32 = 29;

/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Nobody listens.
#[derive(Debug)]
struct Silent;

impl Notify for Silent {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
    fn needs_reset(&self, _: &DeviceFault) {}
}

/// One run with a device of this kind of which the guest sees nothing else, and which takes nothing of the host.
pub fn queues(kind: &str, data: &[u8]) {
    queues_of(&table::describe("device0", kind).unwrap(), &Backends::default(), data);
}

/// One run with a device of this description.
pub fn queues_of(description: &DeviceDescription, backends: &Backends, data: &[u8]) {
    let ram = super::begin();
    let mut host = crate::devices::host::Host::new(Arc::new(FakeVm::default()), Arc::clone(&ram), backends);
    let device = table::make_virtio(description, &mut host).unwrap();
    let mut input = Input(data);
    let mut driver = Driver::new(device, ram, &mut input);
    while !input.is_empty() {
        driver.step(&mut input);
    }
    driver.notify_all();
    driver.end();
}

struct Driver {
    device: Arc<dyn VirtioDevice>,
    ram: Arc<GuestRam>,
    features: u64,
    queues: Vec<Arc<Virtqueue>>,
    setups: Vec<QueueSetup>,
    /// Index of each available ring.
    available: Vec<u16>,
}

impl Driver {
    fn new(device: Arc<dyn VirtioDevice>, ram: Arc<GuestRam>, input: &mut Input<'_>) -> Self {
        let refused = if input.below(2) == 0 { 0 } else { input.u64() };
        let features = (device.features() | 1 << F_EVENT_IDX) & !refused;
        let sizes = device.queue_sizes().to_vec();
        let queues = (0..).zip(&sizes).map(|(index, size)| Arc::new(Virtqueue::new(index, *size).unwrap())).collect();
        let setups = (0..).zip(&sizes).map(|(index, most)| setup(index, *most, input)).collect();
        let mut driver = Self { device, ram, features, queues, setups, available: vec![0; sizes.len()] };
        driver.begin();
        driver
    }

    fn begin(&mut self) {
        for (queue, setup) in self.queues.iter().zip(&self.setups) {
            queue.set_up(setup, self.features >> F_EVENT_IDX & 1 == 1, &self.ram).unwrap();
        }
        let activation = Activation {
            ram: Arc::clone(&self.ram),
            features: self.features,
            queues: self.queues.clone(),
            notify: Arc::new(Silent),
        };
        let _ = self.device.activate(activation);
        self.device.resume();
    }

    fn end(&self) {
        self.device.deactivate();
        inline::serve();
        assert!(!self.device.is_active(), "it ends when it is told to");
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        // A guest cannot write where it has no RAM.
        let _ = self.ram.memory().write_slice(bytes, GuestAddress(address));
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let queue = usize::from(input.u8() & 0x1f) % self.queues.len();
        match input.below(10) {
            0..=2 => self.add_chain(queue, input),
            3 => {
                let index = input.below(ENTRIES);
                let (flags, next) = (input.u16(), input.u16());
                self.write_descriptor(queue, index, (input.address(), input.length(), flags, next));
            }
            4 => self.offer(queue, input.u16()),
            5 => {
                let (address, length) = (input.address(), input.below(32));
                self.write(address, input.bytes(length.into()));
            }
            6 | 7 => {
                let _ = self.queues[queue].kick().write(1);
                inline::serve();
            }
            8 => {
                let (offset, mut register) = (input.below(64).into(), input.register());
                self.device.write_config(offset, &register);
                self.device.read_config(offset, &mut register);
            }
            _ => self.start_anew(input),
        }
    }

    /// A reset and another activation, or what a migration does to the device.
    fn start_anew(&mut self, input: &mut Input<'_>) {
        let saved = self.device.save();
        self.end();
        if input.below(2) == 0 {
            self.device.restore(&saved).unwrap();
        } else {
            // What another host says.
            let _ = self.device.restore(input.bytes(16));
        }
        self.begin();
        inline::serve();
    }

    fn write_descriptor(&self, queue: usize, index: u16, (address, length, flags, next): (u64, u32, u16, u16)) {
        let at = self.setups[queue].descriptors + 16 * u64::from(index);
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &length.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    /// A chain as a driver makes them, of buffers that may be anywhere.
    fn add_chain(&mut self, queue: usize, input: &mut Input<'_>) {
        let size = self.setups[queue].size;
        let (head, count) = (input.below(size), 1 + input.below(4));
        let writable = input.below(5);
        for number in 0..count {
            let at = |number: u16| (head + number) % size;
            let next = if number + 1 < count { NEXT } else { 0 };
            let flags = next | if number >= writable { WRITE } else { 0 };
            self.write_descriptor(queue, at(number), (input.address(), input.length(), flags, at(number + 1)));
        }
        self.offer(queue, head);
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let QueueSetup { available, size, .. } = self.setups[queue];
        let index = &mut self.available[queue];
        let at = available + 4 + 2 * u64::from(*index % size);
        *index = index.wrapping_add(1);
        let index = *index;
        self.write(at, &head.to_le_bytes());
        self.write(available + 2, &index.to_le_bytes());
    }

    fn notify_all(&self) {
        self.queues.iter().for_each(|queue| drop(queue.kick().write(1)));
        inline::serve();
    }
}

fn setup(index: u16, most: u16, input: &mut Input<'_>) -> QueueSetup {
    let descriptors = STRIDE * u64::from(index % QUEUES);
    QueueSetup {
        size: (1 << input.below(5)).min(most).min(ENTRIES),
        is_enabled: index < QUEUES && input.u8() != 0xff,
        descriptors,
        available: descriptors + AVAILABLE,
        used: descriptors + USED,
        next_available: 0,
        next_used: 0,
    }
}
