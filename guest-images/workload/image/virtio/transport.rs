//! A virtio device over PCI (Virtio 1.2, 4.1): its registers, what both sides can do, and its queues.

use core::fmt;

use super::queue::{Bell, Queue, Rings};
use crate::bars::{self, BarError, Window};
use crate::mmio;
use crate::pci::Function;
use crate::traps::Signal;

/// Devices, by what their PCI device number adds to 0x1040.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Net = 1,
    Block = 2,
    Random = 4,
    Balloon = 5,
}

/// Features that are not a device's own.
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_INDEX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Bits of the status register.
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// No interrupt.
const NO_VECTOR: u16 = 0xffff;

/// The structures that a device's capabilities point to; the number is the capability's `cfg_type`.
const COMMON: usize = 1;
const NOTIFY: usize = 2;
const DEVICE: usize = 4;

const VENDOR_CAPABILITY: u8 = 0x09;
const MSIX_CAPABILITY: u8 = 0x11;

/// Why a device cannot be used.
#[derive(Clone, Copy)]
pub enum DeviceError {
    /// There is none.
    Missing(Kind),
    /// Its registers cannot be reached.
    Bars(BarError),
    /// It lacks a capability.
    Incomplete(Kind),
    /// It does not take the features.
    Features(Kind),
    /// It lacks a queue.
    Queue(Kind),
    /// The disk is smaller than what is to be used of it.
    TooSmall,
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(kind) => write!(f, "there is no {kind:?} device of virtio 1 on PCI bus 0"),
            Self::Bars(error) => error.fmt(f),
            Self::Incomplete(kind) => write!(f, "the {kind:?} device lacks a capability of virtio 1"),
            Self::Features(kind) => write!(f, "the {kind:?} device refuses its features"),
            Self::Queue(kind) => write!(f, "the {kind:?} device lacks a queue"),
            Self::TooSmall => f.write_str("the disk is smaller than option disk says"),
        }
    }
}

/// A device's registers.
#[derive(Clone, Copy)]
pub struct Transport {
    kind: Kind,
    common: u64,
    notify: u64,
    multiplier: u32,
    device: u64,
    msix_table: u64,
    /// What both sides can do.
    pub features: u64,
    interrupts: bool,
}

impl Transport {
    /// The first device of this kind.
    pub fn find(kind: Kind, interrupts: bool, window: &mut Window) -> Result<Self, DeviceError> {
        let id = (0x1040 + kind as u32) << 16 | 0x1af4;
        let function = Function::all().find(|function| function.id() == id).ok_or(DeviceError::Missing(kind))?;
        let bases = bars::place(function, window).map_err(DeviceError::Bars)?;
        let base = |bar: u32| bases.get(bar as usize).copied().filter(|base| *base != 0);
        let (mut structures, mut multiplier, mut msix_table) = ([None; 8], 0, None);
        for (offset, head) in function.capabilities() {
            match head as u8 {
                VENDOR_CAPABILITY => {
                    let slot = structures.get_mut((head >> 24) as usize);
                    let address =
                        base(function.read(offset + 4) & 0xff).map(|base| base + u64::from(function.read(offset + 8)));
                    // The first of a kind is the one that the device prefers.
                    if let Some(slot) = slot.filter(|slot| slot.is_none()) {
                        *slot = address;
                    }
                    if head >> 24 == NOTIFY as u32 {
                        multiplier = function.read(offset + 16);
                    }
                }
                MSIX_CAPABILITY => {
                    let place = function.read(offset + 4);
                    msix_table = base(place & 7).map(|base| base + u64::from(place & !7));
                    if interrupts {
                        function.write(offset, head & 0x3fff_ffff | 1 << 31);
                    }
                }
                _ => {}
            }
        }
        let structure = |kind: usize| structures[kind];
        let found = structure(COMMON).zip(structure(NOTIFY));
        let (common, notify) = found.ok_or(DeviceError::Incomplete(kind))?;
        // QEMU's balloon has no MSI-X unless it is told to, and is waited for without.
        let (interrupts, msix_table) = (interrupts && msix_table.is_some(), msix_table.unwrap_or_default());
        // Only a source of randomness has no configuration.
        let device = structure(DEVICE).unwrap_or(common);
        Ok(Self { kind, common, notify, multiplier, device, msix_table, features: 0, interrupts })
    }

    /// Resets the device and agrees on features: those `wanted` that it has.
    pub fn negotiate(&mut self, wanted: u64) -> Result<(), DeviceError> {
        self.set_status(0);
        while self.status() != 0 {
            core::hint::spin_loop();
        }
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.features = self.offered() & (wanted | VERSION_1);
        for half in 0..2 {
            mmio::write_u32(self.common + 8, half);
            mmio::write_u32(self.common + 12, (self.features >> (32 * half)) as u32);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        mmio::write_u16(self.common + 16, NO_VECTOR);
        let is_agreed = self.features & VERSION_1 != 0 && self.status() & FEATURES_OK != 0;
        if is_agreed { Ok(()) } else { Err(DeviceError::Features(self.kind)) }
    }

    /// What the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            mmio::write_u32(self.common, select);
            u64::from(mmio::read_u32(self.common + 4))
        };
        half(0) | half(1) << 32
    }

    /// Whether both sides can do this.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Descriptors that queue `index` may have, of `wanted`, a power of two.
    pub fn queue_size(&self, index: u16, wanted: u16) -> Result<u16, DeviceError> {
        mmio::write_u16(self.common + 22, index);
        match mmio::read_u16(self.common + 24).min(wanted) {
            0 => Err(DeviceError::Queue(self.kind)),
            most => Ok(1 << most.ilog2()),
        }
    }

    /// Sets up queue `index` in these rings.
    pub fn queue(&self, index: u16, rings: Rings, signal: Signal) -> Queue {
        mmio::write_u16(self.common + 22, index);
        mmio::write_u16(self.common + 24, rings.size);
        for (register, address) in [(32, rings.descriptors), (40, rings.available), (48, rings.used)] {
            mmio::write_u32(self.common + register, address as u32);
            mmio::write_u32(self.common + register + 4, (address >> 32) as u32);
        }
        mmio::write_u16(self.common + 26, if self.interrupts { self.route(index, signal) } else { NO_VECTOR });
        let offset = mmio::read_u16(self.common + 30);
        let bell = Bell {
            doorbell: self.notify + u64::from(offset) * u64::from(self.multiplier),
            index,
            event_index: self.has(EVENT_INDEX),
            interrupts: self.interrupts,
        };
        let queue = Queue::new(rings, bell);
        mmio::write_u16(self.common + 28, 1);
        queue
    }

    /// Has the device signal changes of its configuration by MSI-X vector `index`.
    pub fn signal_changes(&self, index: u16, signal: Signal) {
        if self.interrupts {
            mmio::write_u16(self.common + 16, self.route(index, signal));
        }
    }

    /// Has MSI-X vector `index` interrupt the first vCPU.
    fn route(&self, index: u16, signal: Signal) -> u16 {
        let entry = self.msix_table + u64::from(index) * 16;
        let words = [0xfee0_0000, 0, u32::from(signal.vector()), 0];
        words.into_iter().enumerate().for_each(|(word, value)| mmio::write_u32(entry + 4 * word as u64, value));
        index
    }

    /// The device may begin.
    pub fn start(&self) {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        mmio::read_u8(self.common + 20)
    }

    fn set_status(&self, status: u8) {
        mmio::write_u8(self.common + 20, status);
    }

    /// Four bytes of the device's own configuration.
    pub fn config(&self, offset: u64) -> u32 {
        mmio::read_u32(self.device + offset)
    }

    /// Writes four bytes of the device's own configuration.
    pub fn set_config(&self, offset: u64, value: u32) {
        mmio::write_u32(self.device + offset, value);
    }
}
