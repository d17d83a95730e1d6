//! The memory balloon (VIRTIO 1.2, 5.5): memory that the guest gives back becomes holes of guest RAM.
//!
//! Pages come in three ways: the guest inflates the balloon up to the size that the host asks for; it reports pages that are free
//! (free page reporting), which it may take back without a word once the report has been acknowledged; and it deflates, of which the host
//! need do nothing: a page that the guest touches again is a new one, of zeros.

mod port;
mod ranges;
mod serve;
mod stats;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

pub use port::{BalloonPort, BalloonStatus};
pub use stats::BalloonStats;

use super::{Activation, DeviceFault, Notify, VirtioDevice, Worker, Workers};
use crate::devices::host::Host;
use crate::devices::{DeviceDescription, DeviceError};
use serve::Serving;
use stats::Statistics;

/// What it is called in the table of devices.
pub const KIND: &str = "virtio-balloon";
/// Its type.
const TYPE: u32 = 5;
/// Unit of the balloon's size and of page numbers in its queues, whatever the guest's pages are.
const PAGE: u64 = 4096;

/// Feature bits (VIRTIO 1.2, 5.5.3).
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_POISON: u32 = 4;
const F_REPORTING: u32 = 5;

/// Inflate, deflate, statistics, reporting.
const QUEUE_SIZES: [u16; 4] = [128; 4];

/// Bytes of the configuration space: `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`.
const CONFIG_BYTES: usize = 16;
const ACTUAL_AT: u64 = 4;
const POISON_AT: u64 = 12;

/// What the guest sees of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// Whether it may report pages that are free.
    pub free_page_reporting: bool,
    /// Whether the guest deflates it rather than end processes.
    pub deflate_on_oom: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { free_page_reporting: true, deflate_on_oom: true }
    }
}

/// What a balloon holds besides its queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct SavedBalloon {
    target: u32,
    actual: u32,
    poison: u32,
    /// The statistics' buffer that waits to be asked for again.
    stats: Option<u16>,
}

/// The registers, which vCPUs, the worker and the API share.
#[derive(Debug, Default)]
struct Registers {
    /// Pages that the host asks for.
    target: AtomicU32,
    /// Pages that the guest says it has given.
    actual: AtomicU32,
    /// What the guest fills free pages with; 0 for nothing of its own.
    poison: AtomicU32,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    description: DeviceDescription,
    config: BalloonConfig,
    registers: Arc<Registers>,
    statistics: Arc<Statistics>,
    /// By what the driver is told of another target.
    notify: Mutex<Option<Arc<dyn Notify>>>,
    workers: Workers,
}

/// The device of this description, which is the machine's balloon for those outside.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    host: &mut Host,
) -> Result<Arc<dyn VirtioDevice>, DeviceError> {
    let balloon = Arc::new(Balloon::new(description)?);
    host.ports.balloon = Some(Arc::clone(&balloon) as _);
    Ok(balloon)
}

impl Balloon {
    /// A balloon of this description, with nothing in it.
    ///
    /// # Errors
    /// When the description is of something else, or the host has no descriptor left.
    pub fn new(description: &DeviceDescription) -> Result<Self, DeviceError> {
        let refused = |cause| DeviceError::Host { id: description.id.clone(), cause };
        Ok(Self {
            config: description.config()?,
            description: description.clone(),
            registers: Arc::default(),
            statistics: Arc::new(Statistics::new().map_err(refused)?),
            notify: Mutex::new(None),
            workers: Workers::default(),
        })
    }

    fn notify(&self) -> MutexGuard<'_, Option<Arc<dyn Notify>>> {
        self.notify.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        let Registers { target, actual, poison } = self.registers.as_ref();
        for (place, register) in [(0, target), (ACTUAL_AT as usize, actual), (POISON_AT as usize, poison)] {
            space[place..place + 4].copy_from_slice(&register.load(Ordering::SeqCst).to_le_bytes());
        }
        space
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        TYPE
    }

    fn features(&self) -> u64 {
        let bit = |is_offered: bool, feature: u32| u64::from(is_offered) << feature;
        let BalloonConfig { free_page_reporting, deflate_on_oom } = self.config;
        bit(true, F_STATS_VQ)
            | bit(deflate_on_oom, F_DEFLATE_ON_OOM)
            | bit(free_page_reporting, F_PAGE_POISON)
            | bit(free_page_reporting, F_REPORTING)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config_space(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let register = match offset {
            ACTUAL_AT => &self.registers.actual,
            POISON_AT => &self.registers.poison,
            _ => return,
        };
        if let Ok(value) = data.try_into() {
            register.store(u32::from_le_bytes(value), Ordering::SeqCst);
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceFault> {
        let serving = Serving::new(&activation, Arc::clone(&self.registers), Arc::clone(&self.statistics));
        let worker = Worker::new(self.description.id.as_str(), &activation, &activation.queues, serving)?;
        self.statistics.begin();
        *self.notify() = Some(activation.notify);
        self.workers.set([worker]);
        Ok(())
    }

    fn workers(&self) -> &Workers {
        &self.workers
    }

    fn deactivate(&self) {
        self.workers.end();
        self.statistics.end();
        *self.notify() = None;
        for register in [&self.registers.actual, &self.registers.poison] {
            register.store(0, Ordering::SeqCst);
        }
    }

    fn save(&self) -> Vec<u8> {
        let load = |register: &AtomicU32| register.load(Ordering::SeqCst);
        let saved = SavedBalloon {
            target: load(&self.registers.target),
            actual: load(&self.registers.actual),
            poison: load(&self.registers.poison),
            stats: self.statistics.held(),
        };
        // A few numbers: there is nothing that could fail.
        postcard::to_stdvec(&saved).unwrap_or_default()
    }

    fn restore(&self, saved: &[u8]) -> Result<(), DeviceError> {
        let SavedBalloon { target, actual, poison, stats } = self.description.saved(saved)?;
        self.registers.target.store(target, Ordering::SeqCst);
        self.registers.actual.store(actual, Ordering::SeqCst);
        self.registers.poison.store(poison, Ordering::SeqCst);
        self.statistics.hold(stats);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
