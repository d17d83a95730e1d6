//! What vCPUs and the device's workers both change: the status, and by which vector the driver is told of what.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};

use super::common::{DRIVER_OK, NEEDS_RESET};
use crate::devices::pci::Msix;
use crate::devices::virtio::{DeviceFault, Notify};
use crate::log_limit::LogLimit;
use crate::record::Name;

/// No vector (VIRTIO 1.2, 4.1.5.1.2.1).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Bits of the interrupt status (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Registers that nobody waits for.
#[derive(Debug)]
pub(super) struct Shared {
    id: Name,
    pub(super) msix: Msix,
    status: AtomicU8,
    isr: AtomicU8,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    log: Mutex<LogLimit>,
}

impl Shared {
    pub(super) fn new(id: &Name, msix: Msix, queues: usize) -> Self {
        Self {
            id: id.clone(),
            msix,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            log: Mutex::default(),
        }
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn set_status(&self, status: u8) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Sets these bits of the status, and leaves the others.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// The interrupt status, which whoever reads it clears.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    pub(super) fn set_isr(&self, isr: u8) {
        self.isr.store(isr, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn set_generation(&self, generation: u8) {
        self.generation.store(generation, Ordering::SeqCst);
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// The vector, or none where there is no such one.
    fn possible(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.possible(vector), Ordering::SeqCst);
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(place) = self.queue_vectors.get(usize::from(queue)) {
            place.store(self.possible(vector), Ordering::SeqCst);
        }
    }

    /// Back to what it was at the start. MSI-X is PCI's, and stays.
    pub(super) fn reset(&self) {
        self.set_status(0);
        self.set_isr(0);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        self.queue_vectors.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::SeqCst));
    }

    /// Raises every vector: what was raised just before the machine was saved may not have arrived, and one too many does no harm.
    pub(super) fn raise_all(&self) {
        (0..self.queue_vectors.len() as u16).for_each(|queue| self.queue(queue));
        self.raise_config();
    }

    fn raise_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.msix.trigger(self.config_vector());
    }
}

impl Notify for Shared {
    fn queue(&self, queue: u16) {
        // With MSI-X, the vector says it all, and drivers do not look here (4.1.5.3).
        if !self.msix.is_enabled() {
            self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        }
        self.msix.trigger(self.queue_vector(queue));
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise_config();
    }

    fn needs_reset(&self, fault: &DeviceFault) {
        if self.log.lock().unwrap_or_else(PoisonError::into_inner).is_due() {
            tracing::warn!("the guest's driver must reset the device '{}' before it works again: {fault}", self.id);
        }
        let before = self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        if before & DRIVER_OK != 0 {
            self.raise_config();
        }
    }
}
