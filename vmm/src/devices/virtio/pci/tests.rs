//! The transport as a guest's driver sees it, with a device that gives back what it gets.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::transport::SavedVirtio;
use crate::arch::x86_64::layout::{ECAM, PCI_WINDOW};
use crate::devices::host::{Backends, Host};
use crate::devices::testing::FakeVm;
use crate::devices::virtio::testing::{Driver, LIMIT};
use crate::devices::virtio::{Activation, DeviceFault, Events, Handler, VirtioDevice, Worker, Workers};
use crate::devices::{Bus, Device, DeviceDescription, DeviceError, table};
use crate::ram::GuestRam;
use crate::record::{Record, Saved};

const CONFIG: [u8; 6] = *b"config";

/// Two queues; gives every chain back, all that can be written of it as written. A chain of three bytes is a fault. It takes its time
/// to end while `is_slow`.
#[derive(Debug)]
struct Echo {
    description: DeviceDescription,
    workers: Workers,
    is_slow: Arc<AtomicBool>,
    value: AtomicU32,
    notify: Mutex<Option<Arc<dyn crate::devices::virtio::Notify>>>,
}

struct Serving {
    activation: Activation,
    is_slow: Arc<AtomicBool>,
    began: EventFd,
}

impl Handler for Serving {
    fn start(&mut self, events: &Events) -> Result<(), DeviceFault> {
        events.add(&self.began, EventSet::IN, 1).map_err(|cause| DeviceFault::Host { what: "epoll_ctl", cause })
    }

    fn queue(&mut self, index: u16, _: &Events) -> Result<(), DeviceFault> {
        let Activation { ram, notify, queues, .. } = &self.activation;
        let mut queue = queues[usize::from(index)].lock(ram, notify.as_ref());
        if !queue.is_ready() {
            return Ok(());
        }
        while let Some(chain) = queue.pop()? {
            if chain.readable.len() == 3 {
                return Err(DeviceFault::Queue { queue: index, why: "three bytes".into() });
            }
            queue.push(chain.head, chain.writable.len() as u32)?;
        }
        queue.notify()
    }

    fn quiesce(&mut self) -> bool {
        while self.is_slow.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::devices::virtio::read_config_space(&CONFIG, offset, data);
    }
    fn activate(&self, activation: Activation) -> Result<(), DeviceFault> {
        *self.notify.lock().unwrap() = Some(Arc::clone(&activation.notify));
        let began = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let serving = Serving { activation: activation.clone(), is_slow: Arc::clone(&self.is_slow), began };
        self.workers.set([Worker::new("echo", &activation, &activation.queues, serving)?]);
        Ok(())
    }
    fn workers(&self) -> &Workers {
        &self.workers
    }
    fn save(&self) -> Vec<u8> {
        postcard::to_stdvec(&self.value.load(Ordering::SeqCst)).unwrap()
    }
    fn restore(&self, saved: &[u8]) -> Result<(), DeviceError> {
        self.value.store(self.description.saved(saved)?, Ordering::SeqCst);
        Ok(())
    }
}

/// A bus with the bridge and this one device, and the guest that drives it.
struct Guest {
    vm: FakeVm,
    ram: Arc<GuestRam>,
    bus: Bus,
    device: Arc<dyn Device>,
    echo: Arc<Echo>,
    bar: u64,
}

fn u16_of(bytes: [u8; 2]) -> u16 {
    u16::from_le_bytes(bytes)
}

impl Guest {
    fn new(ram: &Arc<GuestRam>) -> Self {
        let vm = FakeVm::default();
        let mut host = Host::new(Arc::new(vm.clone()), Arc::clone(ram), &Backends::default());
        let mut bus = Bus::default();
        let bridge = table::describe("pci0", crate::devices::pci::SavedHostBridge::KIND).unwrap();
        let bridge = crate::devices::pci::make(&bridge, &mut host).unwrap();
        for (range, access) in bridge.memory() {
            bus.add_memory(range, &"pci0".try_into().unwrap(), access).unwrap();
        }
        let description =
            DeviceDescription { kind: "virtio-echo".try_into().unwrap(), ..table::describe("echo0", "echo").unwrap() };
        let echo = Arc::new(Echo {
            description: description.clone(),
            workers: Workers::default(),
            is_slow: Arc::default(),
            value: AtomicU32::new(7),
            notify: Mutex::default(),
        });
        let device = super::make(&description, Arc::clone(&echo) as _, &host).unwrap();
        device.resume();
        Self { vm, ram: Arc::clone(ram), bus, device, echo, bar: PCI_WINDOW.start }
    }

    fn fresh() -> Self {
        Self::new(&Arc::new(GuestRam::new(4 << 20).unwrap()))
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.bus.memory_read(ECAM.start + 0x8000 + offset, &mut data);
        data
    }

    fn set_config(&self, offset: u64, data: &[u8]) {
        self.bus.memory_write(ECAM.start + 0x8000 + offset, data);
    }

    fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.bus.memory_read(self.bar + offset, &mut data);
        data
    }

    fn set(&self, offset: u64, data: &[u8]) {
        self.bus.memory_write(self.bar + offset, data);
    }

    fn status(&self) -> u8 {
        self.get::<1>(0x14)[0]
    }

    fn set_status(&self, bits: u8) {
        self.set(0x14, &[bits]);
    }

    fn wait_for_status(&self, done: impl Fn(u8) -> bool) -> u8 {
        let deadline = Instant::now() + LIMIT;
        while !done(self.status()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.status()
    }

    /// Memory space on, MSI-X on, vectors 0x30 for the configuration and 0x40 and 0x41 for the queues.
    fn enable(&self) {
        self.set_config(4, &[6, 0]);
        let msix = self.capability(0x11, None);
        self.set_config(msix + 2, &[0, 0x80]);
        for (vector, data) in [(0, 0x30_u32), (1, 0x40), (2, 0x41)] {
            self.set(0x4000 + 16 * vector, &[0xfee0_0000, 0, data, 0].map(u32::to_le_bytes).concat());
        }
    }

    /// The capability of this id, and of this virtio type.
    fn capability(&self, id: u8, kind: Option<u8>) -> u64 {
        let mut at = u64::from(self.config::<1>(0x34)[0]);
        while at != 0 {
            let [found, next, _, found_kind] = self.config(at);
            if found == id && kind.is_none_or(|kind| kind == found_kind) {
                return at;
            }
            at = next.into();
        }
        panic!("no capability {id} {kind:?}")
    }

    /// Accepts these features besides version 1, up to FEATURES_OK.
    fn negotiate(&self, features: u32) -> u8 {
        self.set_status(1);
        self.set_status(3);
        for (select, half) in [(0_u32, features), (1, 1)] {
            self.set(8, &select.to_le_bytes());
            self.set(0xc, &half.to_le_bytes());
        }
        self.set_status(11);
        self.status()
    }

    /// Sets up a queue with rings where [`Driver`] has them.
    fn set_up(&self, queue: u16, driver: &Driver) {
        self.set(0x16, &queue.to_le_bytes());
        self.set(0x18, &driver.size.to_le_bytes());
        self.set(0x1a, &(queue + 1).to_le_bytes());
        self.set(0x20, &driver.base.to_le_bytes());
        self.set(0x28, &(driver.avail_ring() as u32).to_le_bytes());
        self.set(0x2c, &0_u32.to_le_bytes());
        self.set(0x30, &driver.used_ring().to_le_bytes());
        self.set(0x1c, &[1, 0]);
    }

    /// A driver at work on the first queue.
    fn start(&self, features: u32) -> Driver {
        self.enable();
        assert_eq!(self.negotiate(features), 11);
        self.set(0x10, &[0, 0]);
        let driver = Driver::new(&self.ram, 0, 16, 0x10_0000);
        self.set_up(0, &driver);
        self.set_status(15);
        assert_eq!(self.status(), 15);
        driver
    }

    fn notify(&self, queue: u64) {
        self.set(0x3000 + 4 * queue, &[0, 0]);
    }
}

#[test]
fn a_driver_finds_its_way_by_the_capabilities() {
    let guest = Guest::fresh();
    assert_eq!(guest.config::<4>(0), [0xf4, 0x1a, 0x40 + 42, 0x10]);
    assert_eq!(guest.config::<1>(8), [1]);
    guest.set_config(4, &[2, 0]);
    let part = |kind| {
        let at = guest.capability(9, Some(kind));
        let dword = |offset| u32::from_le_bytes(guest.config(at + offset));
        assert_eq!(guest.config::<1>(at + 4), [0], "all in the first BAR");
        (dword(8), dword(12))
    };
    assert_eq!([part(1), part(2), part(3), part(4)].map(|(start, _)| start), [0, 0x3000, 0x1000, 0x2000]);
    assert_eq!(guest.get::<6>(0x2000), CONFIG);
    assert_eq!(guest.get::<2>(0x12), [2, 0], "queues");
    let sizes = [0_u16, 1, 2].map(|queue| {
        guest.set(0x16, &queue.to_le_bytes());
        (u16_of(guest.get(0x18)), u16_of(guest.get(0x1e)), u16_of(guest.get(0x1a)))
    });
    assert_eq!(sizes, [(16, 0, 0xffff), (8, 1, 0xffff), (0, 0, 0)]);
    let features = [0_u32, 1, 2].map(|select| {
        guest.set(0, &select.to_le_bytes());
        u32::from_le_bytes(guest.get(4))
    });
    assert_eq!(features, [0b101 | 1 << 28 | 1 << 29, 1, 0]);
    guest.set(0x16, &[0, 0]);
    guest.set(0x1a, &[9, 0]);
    assert_eq!(u16_of(guest.get(0x1a)), 0xffff, "there is no such vector");
}

#[test]
fn chains_go_through_with_and_without_an_event_index() {
    for features in [0, 1 << 29] {
        let guest = Guest::fresh();
        let mut driver = guest.start(features);
        for number in 0..40 {
            let head = driver.add(&[(0x20_0000, 1)], &[(0x20_1000, 7)]);
            guest.notify(0);
            assert_eq!(driver.used(), Some((head.into(), 7)), "{number}");
        }
        let deadline = Instant::now() + LIMIT;
        while guest.vm.sent().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(guest.vm.sent().iter().all(|data| *data == 0x40));
        assert_eq!(guest.vm.io_events(), [PCI_WINDOW.start + 0x3000]);
    }
}

#[test]
fn the_status_goes_only_where_it_can() {
    let guest = Guest::fresh();
    guest.enable();
    guest.set_status(3);
    guest.set_status(7);
    assert_eq!(guest.status(), 3, "nothing has been agreed on");
    assert_eq!(guest.negotiate(0b10), 3, "not offered");
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
    guest.set_status(11);
    assert_eq!(guest.status(), 3, "not without version 1");
    assert_eq!(guest.negotiate(0b100), 11);
    guest.set(8, &0_u32.to_le_bytes());
    guest.set(0xc, &[0xff; 4]);
    guest.set_status(11 | 64);
    assert_eq!((guest.status(), u32::from_le_bytes(guest.get(0xc))), (11, 0b100), "too late for others");
    guest.set_status(8);
    assert_eq!(guest.status(), 11, "bits are not taken back");
}

#[test]
fn queues_outside_ram_need_a_reset() {
    for (offset, address) in [(0x20, 4 << 20), (0x20, 8), (0x28, u64::MAX - 1), (0x30, 2), (0x30, (4 << 20) - 8)] {
        let guest = Guest::fresh();
        guest.enable();
        guest.negotiate(0);
        guest.set(0x10, &[0, 0]);
        let driver = Driver::new(&guest.ram, 0, 16, 0x10_0000);
        guest.set_up(0, &driver);
        guest.set(offset, &u64::to_le_bytes(address));
        guest.set_status(15);
        assert_eq!((guest.status(), guest.vm.sent()), (15 | 64, vec![0x30]), "{address:#x}");
        assert_eq!(guest.get::<1>(0x1000), [2]);
        guest.set_status(0);
        assert_eq!(guest.status(), 0);
        let guest = Guest::new(&guest.ram);
        let mut driver = guest.start(0);
        driver.add(&[(0x20_0000, 1)], &[]);
        guest.notify(0);
        assert_eq!(driver.used(), Some((0, 0)));
    }
}

#[test]
fn a_fault_needs_a_reset_and_a_reset_heals() {
    let guest = Guest::fresh();
    let mut driver = guest.start(0);
    driver.add(&[(0x20_0000, 3)], &[]);
    guest.notify(0);
    assert_eq!(guest.wait_for_status(|status| status & 64 != 0), 15 | 64);
    guest.set_status(0);
    assert_eq!(guest.wait_for_status(|status| status == 0), 0);
    assert_eq!(guest.vm.io_events(), [0; 0]);
    let mut driver = guest.start(0);
    driver.add(&[(0x20_0000, 1)], &[]);
    guest.notify(0);
    assert_eq!(driver.used(), Some((0, 0)));
}

#[test]
fn a_reset_waits_for_the_device_and_nobody_for_the_reset() {
    let guest = Guest::fresh();
    guest.start(0);
    guest.echo.is_slow.store(true, Ordering::SeqCst);
    guest.set_status(0);
    assert_ne!(guest.status(), 0);
    guest.set_status(1);
    guest.set(0x10, &[1, 0]);
    assert_eq!((guest.status(), guest.get::<2>(0x10)), (15, [0, 0]), "nothing can be written meanwhile");
    assert!(guest.device.pause(Instant::now()).is_err());
    guest.echo.is_slow.store(false, Ordering::SeqCst);
    assert_eq!(guest.wait_for_status(|status| status == 0), 0);
    guest.device.resume();
    guest.start(0);
}

#[test]
fn the_bar_moves_and_its_events_with_it() {
    let mut guest = Guest::fresh();
    let mut driver = guest.start(0);
    guest.set_config(0x10, &[0xff; 4]);
    assert_eq!(u32::from_le_bytes(guest.config(0x10)), 0xffff_8000);
    assert_eq!((guest.vm.io_events(), guest.get::<1>(0x14)), (vec![], [0xff]));
    guest.set_config(0x10, &0xd000_0000_u32.to_le_bytes());
    guest.bar = 0xd000_0000;
    assert_eq!((guest.vm.io_events(), guest.status()), (vec![0xd000_3000], 15));
    driver.add(&[(0x20_0000, 1)], &[]);
    guest.notify(0);
    assert_eq!(driver.used(), Some((0, 0)));
    guest.set_config(4, &[4]);
    assert_eq!(guest.vm.io_events(), [0; 0]);
    guest.set_config(4, &[6]);
    assert_eq!(guest.vm.io_events(), [0xd000_3000]);
}

#[test]
fn registers_are_reached_by_configuration_space_too() {
    let guest = Guest::fresh();
    let window = guest.capability(9, Some(5));
    let aim = |offset: u32, length: u32| {
        guest.set_config(window + 4, &[0]);
        guest.set_config(window + 8, &offset.to_le_bytes());
        guest.set_config(window + 12, &length.to_le_bytes());
    };
    aim(0x14, 1);
    guest.set_config(window + 16, &[3]);
    assert_eq!(guest.config::<1>(window + 16), [3]);
    aim(0x2000, 4);
    assert_eq!(guest.config::<4>(window + 16), *b"conf");
    for (offset, length) in [(0x2001, 4), (0x14, 3), (0x8000, 4), (u32::MAX, 1), (0, u32::MAX)] {
        aim(offset, length);
        guest.set_config(window + 16, &[0; 4]);
        assert_eq!(guest.config::<4>(window + 16), [0; 4]);
    }
    guest.set_config(4, &[2]);
    assert_eq!(guest.status(), 3);
}

#[test]
fn a_change_of_the_configuration_is_told() {
    let guest = Guest::fresh();
    guest.start(0);
    let generation = guest.get::<1>(0x15)[0];
    guest.echo.notify.lock().unwrap().as_ref().unwrap().config();
    assert_eq!((guest.get::<1>(0x15)[0], guest.vm.sent()), (generation + 1, vec![0x30]));
    assert_eq!([guest.get::<1>(0x1000), guest.get::<1>(0x1000)], [[2], [0]], "reading clears it");
}

#[test]
fn a_driver_at_work_goes_on_elsewhere() {
    let guest = Guest::fresh();
    let mut driver = guest.start(1 << 29);
    guest.set_config(0x10, &0xd000_0000_u32.to_le_bytes());
    driver.add(&[(0x20_0000, 1)], &[]);
    driver.kick();
    guest.device.pause(Instant::now() + LIMIT).unwrap();
    driver.add(&[(0x20_0000, 1)], &[]);
    guest.echo.value.store(9, Ordering::SeqCst);
    let saved = guest.device.save().unwrap();
    assert_eq!((saved.id.as_str(), saved.kind.as_str()), ("echo0", "virtio-echo"));

    let mut other = Guest::new(&guest.ram);
    other.device.pause(Instant::now() + LIMIT).unwrap();
    other.device.restore(&saved).unwrap();
    other.bar = 0xd000_0000;
    assert_eq!(other.device.save().unwrap(), saved);
    assert_eq!((other.vm.io_events(), other.vm.routings(), other.status()), (vec![], 0, 15));
    other.device.resume();
    assert_eq!((other.vm.io_events(), other.vm.routings()), (vec![0xd000_3000], 1), "all routes at once");
    assert_eq!([driver.used(), driver.used()], [Some((0, 0)), Some((1, 0))], "none is lost, none comes twice");
    assert!(other.vm.sent().contains(&0x40) && other.vm.sent().contains(&0x30));
    assert_eq!(other.echo.value.load(Ordering::SeqCst), 9);
    driver.add(&[(0x20_0000, 1)], &[]);
    other.notify(0);
    assert_eq!(driver.used(), Some((2, 0)));
}

#[test]
fn a_machine_that_starts_anew_finds_what_it_found_at_first() {
    let guest = Guest::fresh();
    let first = guest.device.save().unwrap();
    guest.start(0);
    guest.set_config(0x10, &0xd000_0000_u32.to_le_bytes());
    guest.device.pause(Instant::now() + LIMIT).unwrap();
    guest.device.reset();
    assert_eq!(guest.device.save().unwrap(), first);
    assert_eq!(guest.vm.io_events(), [0; 0]);
    guest.device.resume();
    guest.start(0);
}

#[test]
fn what_cannot_be_is_not_restored() {
    let guest = Guest::fresh();
    guest.start(0);
    guest.device.pause(Instant::now() + LIMIT).unwrap();
    let record = guest.device.save().unwrap();
    let saved: SavedVirtio = record.read_as("virtio-echo", 0).unwrap();
    let refused = |change: &dyn Fn(&mut SavedVirtio), words: &str| {
        let mut wrong = saved.clone();
        change(&mut wrong);
        let bytes = postcard::to_stdvec(&wrong).unwrap();
        let other = Guest::fresh();
        let why = other.device.restore(&Record { bytes, ..record.clone() }).unwrap_err().to_string();
        assert!(why.contains("'echo0'") && why.contains(words), "{why}");
        other.device.resume();
    };
    refused(&|s| s.common.queues.truncate(1), "1 queues");
    refused(&|s| s.queue_vectors.push(1), "2 queues");
    refused(&|s| s.common.queues[0].size = 32, "a size");
    refused(&|s| s.common.queues[0].size = 0, "a size");
    refused(&|s| s.common.driver_features |= 2, "features");
    refused(&|s| s.status = 4, "status");
    refused(&|s| s.config.0[2] += 1, "configuration space");
    refused(&|s| s.msix.table.truncate(16), "interrupt vectors");
    refused(&|s| s.device = vec![], "no sense");
    refused(&|s| s.device = vec![0; 9], "too many");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_accesses_do_harm(steps in prop::collection::vec(
        (any::<bool>(), any::<bool>(), prop_oneof![0..0x40_u64, 0..0x8000_u64], any::<[u8; 8]>(), 0..4_u32), 0..120)) {
        let guest = Guest::fresh();
        guest.enable();
        for (is_config, is_write, offset, mut bytes, width) in steps {
            let data = &mut bytes[..1 << width];
            match (is_config, is_write) {
                (true, true) => guest.set_config(offset % 256, data),
                (true, false) => guest.bus.memory_read(ECAM.start + 0x8000 + offset % 256, data),
                (false, true) => guest.set(offset, data),
                (false, false) => guest.bus.memory_read(guest.bar + offset, data),
            }
        }
        guest.device.pause(Instant::now() + LIMIT).unwrap();
        let record = guest.device.save().unwrap();
        let other = Guest::new(&guest.ram);
        other.device.pause(Instant::now() + LIMIT).unwrap();
        other.device.restore(&record).unwrap();
        prop_assert_eq!(other.device.save().unwrap(), record);
        other.device.resume();
    }

    #[test]
    fn no_saved_bytes_do_harm(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let guest = Guest::fresh();
        guest.start(0);
        guest.device.pause(Instant::now() + LIMIT).unwrap();
        let mut record = guest.device.save().unwrap();
        let at = at.index(record.bytes.len());
        record.bytes[at] = byte;
        let other = Guest::new(&guest.ram);
        if other.device.restore(&record).is_ok() {
            other.device.resume();
            other.wait_for_status(|_| true);
        }
    }
}
