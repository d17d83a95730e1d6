//! A virtio device as the machine and the bus see it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::common;
use super::layout::{
    BAR, BAR_SIZE, COMMON, DEVICE, ISR, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_STRIDE, Offsets, config_space,
};
use super::shared::Shared;
use super::transport::{SavedVirtio, Transport};
use crate::devices::host::Host;
use crate::devices::pci::{ConfigSpace, Msix, PciFunction, msix};
use crate::devices::virtio::VirtioDevice;
use crate::devices::{Device, DeviceDescription, DeviceError, Handover, StillBusy};
use crate::record::{Record, RecordError};

/// Where the BAR is while nobody decodes it: nowhere.
const NOWHERE: u64 = u64::MAX;
/// How long a device at rest may take to end.
const RESET_LIMIT: Duration = Duration::from_secs(5);

/// A virtio device in a slot of the bus.
#[derive(Debug)]
struct VirtioFunction {
    description: DeviceDescription,
    transport: Transport,
    /// As it was at the start.
    initial: ConfigSpace,
    config: Mutex<ConfigSpace>,
    offsets: Offsets,
    /// Where the BAR is decoded.
    bar: AtomicU64,
}

/// Puts a device into the next slot of the bus.
///
/// # Errors
/// When there is no bus or no slot, or the host refuses.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    device: Arc<dyn VirtioDevice>,
    host: &Host,
) -> Result<Arc<dyn Device>, DeviceError> {
    let no = |what: &str| description.refused(std::io::Error::other(what.to_owned()));
    let bus = host.pci.as_ref().ok_or_else(|| no("no PCI host bridge is described before it"))?;
    let description = description.clone().with_features(common::offered(device.as_ref()))?;
    let queues = device.queue_sizes().len();
    // One for the configuration.
    let vectors = (queues + 1).min(msix::MAX_VECTORS) as u16;
    let address = bus.allocate(BAR_SIZE).ok_or_else(|| no("the window of the PCI bus is full"))?;
    let (config, offsets) = config_space(device.device_type(), vectors, address);
    let interrupts = host.interrupts.messages(vectors).map_err(|e| description.refused(e))?;
    let shared = Arc::new(Shared::new(&description.id, Msix::new(&description.id, vectors, interrupts), queues));
    let transport =
        Transport::new(device, description.features, Arc::clone(&host.ram), Arc::clone(&host.io_events), shared);
    let function = Arc::new(VirtioFunction {
        transport: transport.map_err(|e| description.refused(e))?,
        description,
        initial: config.clone(),
        config: Mutex::new(config),
        offsets,
        bar: AtomicU64::new(NOWHERE),
    });
    bus.add(Arc::clone(&function) as _).ok_or_else(|| no("the PCI bus has no slot left"))?;
    Ok(function)
}

impl VirtioFunction {
    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the BAR is decoded, if it is.
    fn bar(&self) -> Option<u64> {
        Some(self.bar.load(Ordering::SeqCst)).filter(|bar| *bar != NOWHERE)
    }

    /// Has all else know what the guest has written to configuration space.
    fn apply(&self, config: &ConfigSpace) {
        let bar = config.decoded(BAR).map(|range| range.start);
        self.bar.store(bar.unwrap_or(NOWHERE), Ordering::SeqCst);
        self.transport.set_bar(bar);
        self.transport.shared.msix.set_control(self.control(config));
    }

    fn control(&self, config: &ConfigSpace) -> u16 {
        config.word(self.offsets.msix_control) & msix::CONTROL_WRITABLE
    }

    fn is_window(&self, offset: usize, length: usize) -> bool {
        let data = self.offsets.window_data();
        offset < data + 4 && data < offset + length
    }

    fn restore(&self, saved: &SavedVirtio) -> Result<(), DeviceError> {
        let bad = |why| self.description.bad_state(why);
        self.transport.check(saved).map_err(bad)?;
        let mut config = self.lock();
        let mut restored = config.clone();
        restored.restore(&saved.config).map_err(bad)?;
        self.transport.restore(saved, self.control(&restored))?;
        *config = restored;
        self.bar.store(config.decoded(BAR).map_or(NOWHERE, |range| range.start), Ordering::SeqCst);
        Ok(())
    }
}

impl PciFunction for VirtioFunction {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = self.lock();
        if let Some(window) = self.offsets.window(&config).filter(|_| self.is_window(offset, data.len())) {
            let mut bytes = [0; 4];
            self.read_bar(BAR, window.offset, &mut bytes[..window.length]);
            config.write(self.offsets.window_data(), &bytes);
        }
        config.read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut config = self.lock();
        config.write(offset, data);
        if self.is_window(offset, data.len()) {
            if let Some(window) = self.offsets.window(&config) {
                let bytes = config.dword(self.offsets.window_data()).to_le_bytes();
                self.write_bar(BAR, window.offset, &bytes[..window.length]);
            }
        } else {
            self.apply(&config);
        }
    }

    fn decode(&self, address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(self.bar()?)?;
        (offset < BAR_SIZE.into()).then_some((BAR, offset))
    }

    fn read_bar(&self, _: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let shared = &self.transport.shared;
        match offset {
            _ if COMMON.contains(&offset) => self.transport.read_common(offset, data),
            _ if offset == ISR.start => data.iter_mut().take(1).for_each(|byte| *byte = shared.take_isr()),
            _ if DEVICE.contains(&offset) => self.transport.device().read_config(offset - DEVICE.start, data),
            _ if MSIX_TABLE.contains(&offset) => shared.msix.read_table(offset - MSIX_TABLE.start, data),
            _ if MSIX_PENDING.contains(&offset) => shared.msix.read_pending(offset - MSIX_PENDING.start, data),
            _ => {}
        }
    }

    fn write_bar(&self, _: usize, offset: u64, data: &[u8]) {
        match offset {
            _ if COMMON.contains(&offset) => self.transport.write_common(offset, data, self.bar()),
            _ if DEVICE.contains(&offset) => self.transport.device().write_config(offset - DEVICE.start, data),
            _ if NOTIFY.contains(&offset) => self.transport.kick((offset - NOTIFY.start) / NOTIFY_STRIDE),
            _ if MSIX_TABLE.contains(&offset) => {
                self.transport.shared.msix.write_table(offset - MSIX_TABLE.start, data);
            }
            _ => {}
        }
    }
}

impl Device for VirtioFunction {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn pause(&self, deadline: Instant) -> Result<(), StillBusy> {
        self.transport.pause(deadline)
    }

    fn resume(&self) {
        self.transport.resume(self.bar());
    }

    fn reset(&self) {
        if !self.transport.reset(RESET_LIMIT) {
            tracing::warn!("the device '{}' has not ended within {RESET_LIMIT:?}", self.description.id);
        }
        let mut config = self.lock();
        *config = self.initial.clone();
        self.apply(&config);
    }

    fn hand_over(&self, step: Handover, deadline: Instant) -> Result<(), DeviceError> {
        self.transport.device().hand_over(step, deadline)
    }

    fn save(&self) -> Result<Record, RecordError> {
        let config = self.lock().save();
        let record = Record::of(self.description.id.as_str(), &self.transport.save(config))?;
        Ok(Record { kind: self.description.kind.clone(), version: self.description.version, ..record })
    }

    fn restore(&self, saved: &Record) -> Result<(), DeviceError> {
        let DeviceDescription { kind, version, .. } = &self.description;
        self.restore(&saved.read_as(kind.as_str(), *version)?)
    }
}
