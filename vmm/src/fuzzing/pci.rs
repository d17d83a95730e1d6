//! A guest that does what it wants with PCI: configuration space of a bridge and two virtio devices by ports and memory, and the
//! registers behind their BARs.

use std::time::Duration;

use super::input::Input;
use crate::arch::x86_64::layout::{ECAM, PCI_CONFIG_PORTS, PCI_WINDOW};
use crate::devices::pci::SavedHostBridge;
use crate::devices::testing::FakeVm;
use crate::devices::virtio::{inline, rng};
use crate::devices::{Devices, table};
use crate::record::{Records, Saved};

/// Slots of the bus that are of interest: two devices, and none behind them.
const SLOTS: u16 = 4;
/// Bytes of configuration space of a device with all its functions.
const SLOT_BYTES: u64 = 0x8000;
/// Bytes behind a BAR.
const BAR_BYTES: u16 = 0x8000;
/// Bytes of the common configuration, where most of a driver's work is.
const COMMON_BYTES: u16 = 0x40;

/// One run.
pub fn pci(data: &[u8]) {
    let ram = super::begin();
    let described = [("pci0", SavedHostBridge::KIND), ("rng0", rng::KIND), ("rng1", rng::KIND)];
    let described = described.map(|(id, kind)| table::describe(id, kind).unwrap());
    let make = || Devices::new(&described, FakeVm::default().make_host(&ram)).unwrap();
    let mut devices = make();
    devices.resume();
    let mut input = Input(data);
    while !input.is_empty() {
        step(&mut devices, &mut input, &make);
        inline::serve();
    }
}

fn step(devices: &mut Devices, input: &mut Input<'_>, make: &dyn Fn() -> Devices) {
    let bus = devices.bus();
    match input.below(16) {
        0 => {
            let port = PCI_CONFIG_PORTS.start as u16 + input.below(8);
            drop(bus.port_write(port, &input.register()));
        }
        1 => bus.port_read(PCI_CONFIG_PORTS.start as u16 + input.below(8), &mut input.register()),
        2..=4 => {
            let address = config_address(input);
            drop(bus.memory_write(address, &input.register()));
        }
        5 => bus.memory_read(config_address(input), &mut input.register()),
        6..=11 => {
            let address = bar_address(input);
            drop(bus.memory_write(address, &input.register()));
        }
        12 => bus.memory_read(bar_address(input), &mut input.register()),
        13 => *devices = elsewhere(devices, make),
        14 => {
            devices.pause(Duration::ZERO).unwrap();
            devices.reset();
            devices.resume();
        }
        _ => {
            let address = u64::from(input.u32());
            drop(bus.memory_write(address, &input.register()));
        }
    }
}

/// A register of configuration space, also of a function and a device that are not there.
fn config_address(input: &mut Input<'_>) -> u64 {
    ECAM.start + SLOT_BYTES * u64::from(input.below(SLOTS)) + u64::from(input.below(0x140))
}

/// A register behind a BAR that is where it was at the start.
fn bar_address(input: &mut Input<'_>) -> u64 {
    let limit = if input.below(4) == 0 { BAR_BYTES } else { COMMON_BYTES };
    PCI_WINDOW.start + u64::from(BAR_BYTES) * u64::from(input.below(2)) + u64::from(input.below(limit))
}

/// The devices as they are on another host, where they are the same.
fn elsewhere(devices: &Devices, make: &dyn Fn() -> Devices) -> Devices {
    devices.pause(Duration::ZERO).unwrap();
    let records = Records(devices.save().unwrap());
    let other = make();
    let mut parts = records.by_part().unwrap();
    let taken = other.check(&mut parts).unwrap();
    other.restore(&taken).unwrap();
    assert_eq!(Records(other.save().unwrap()), records);
    other.resume();
    other
}
