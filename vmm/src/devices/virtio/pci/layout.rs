//! Where the registers of a virtio device over PCI lie in its BAR, and the capabilities that say so (VIRTIO 1.2, 4.1.4).

use std::ops::Range;

use crate::devices::pci::{ConfigSpace, Identity, msix};

/// The BAR that has everything, and its size in bytes.
pub(super) const BAR: usize = 0;
pub(super) const BAR_SIZE: u32 = 0x8000;

/// What lies in it, a page each so that a driver can map one alone.
pub(super) const COMMON: Range<u64> = 0..0x1000;
pub(super) const ISR: Range<u64> = 0x1000..0x2000;
pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
pub(super) const NOTIFY: Range<u64> = 0x3000..0x4000;
pub(super) const MSIX_TABLE: Range<u64> = 0x4000..0x5000;
pub(super) const MSIX_PENDING: Range<u64> = 0x5000..0x6000;

/// Bytes from one queue's notification register to the next one's.
pub(super) const NOTIFY_STRIDE: u64 = 4;

/// PCI's vendor id of virtio, and the device id of the type 0 (VIRTIO 1.2, 4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// A device of version 1 without the older interface.
const REVISION: u8 = 1;

/// A capability that belongs to the vendor.
const VENDOR_SPECIFIC: u8 = 0x09;

/// Types of virtio's capabilities (VIRTIO 1.2, 4.1.4), and what the body of one has behind id and link: length, type, BAR, number, two
/// bytes of nothing, offset and length of what it is about.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
const HEAD: u8 = 16;

/// Offsets in the body of the capability by which configuration space reaches the BAR.
const WINDOW_BAR: usize = 2;
const WINDOW_OFFSET: usize = 6;
const WINDOW_DATA: usize = 14;

/// Where a function's configuration space has what is more than bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offsets {
    /// MSI-X's message control.
    pub(super) msix_control: usize,
    window: usize,
}

/// Part of the BAR that configuration space shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) offset: u64,
    pub(super) length: usize,
}

impl Offsets {
    /// Where the data of the window to the BAR is.
    pub(super) fn window_data(&self) -> usize {
        self.window + WINDOW_DATA
    }

    /// What the driver has set the window to, if it is something that can be (4.1.4.9).
    pub(super) fn window(&self, config: &ConfigSpace) -> Option<Window> {
        let offset = u64::from(config.dword(self.window + WINDOW_OFFSET));
        let length = config.dword(self.window + WINDOW_OFFSET + 4);
        let bar = config.word(self.window + WINDOW_BAR) & 0xff;
        let is_possible = usize::from(bar) == BAR
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length.into())
            && offset < BAR_SIZE.into();
        is_possible.then_some(Window { offset, length: length as usize })
    }
}

fn body(kind: u8, length: u8, range: &Range<u64>) -> Vec<u8> {
    let mut body = vec![length, kind, BAR as u8, 0, 0, 0];
    body.extend((range.start as u32).to_le_bytes());
    body.extend(((range.end - range.start) as u32).to_le_bytes());
    body
}

/// Base class, sub-class and programming interface of a device of this type.
fn class(device_type: u32) -> u32 {
    match device_type {
        // Ethernet; other mass storage; other communication, twice; no class at all.
        1 => 0x02_0000,
        2 => 0x01_8000,
        3 | 19 => 0x07_8000,
        _ => 0xff_0000,
    }
}

/// Configuration space of a device of this type with this many vectors, whose BAR is at `address`.
pub(super) fn config_space(device_type: u32, vectors: u16, address: u32) -> (ConfigSpace, Offsets) {
    let identity = Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_type as u16,
        revision: REVISION,
        class: class(device_type),
        subsystem: (VENDOR, DEVICE_BASE + device_type as u16),
    };
    let mut config = ConfigSpace::new(&identity).with_bar(BAR, BAR_SIZE, address);
    let mut add = |body: &[u8]| config.add_capability(VENDOR_SPECIFIC, body, &[]);
    add(&body(COMMON_CFG, HEAD, &COMMON));
    add(&body(ISR_CFG, HEAD, &ISR));
    add(&body(DEVICE_CFG, HEAD, &DEVICE));
    add(&[body(NOTIFY_CFG, HEAD + 4, &NOTIFY), (NOTIFY_STRIDE as u32).to_le_bytes().to_vec()].concat());
    let mut writable = [0; WINDOW_DATA + 4];
    writable[WINDOW_BAR] = 0xff;
    writable[WINDOW_OFFSET..].fill(0xff);
    let window = [body(PCI_CFG, HEAD + 4, &(0..0)), vec![0; 4]].concat();
    let window = 2 + config.add_capability(VENDOR_SPECIFIC, &window, &writable);
    let mut vectors = (vectors - 1).to_le_bytes().to_vec();
    for range in [MSIX_TABLE, MSIX_PENDING] {
        vectors.extend((range.start as u32 | BAR as u32).to_le_bytes());
    }
    let msix_control = 2 + config.add_capability(msix::CAPABILITY, &vectors, &msix::CONTROL_WRITABLE.to_le_bytes());
    (config, Offsets { msix_control, window })
}
