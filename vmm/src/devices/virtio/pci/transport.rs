//! Between driver and device: activation, reset, notifications, and what is saved of all that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::common::{CommonConfig, DRIVER_OK, F_EVENT_IDX, FEATURES_OK, NEEDS_RESET, STATUS};
use super::layout::{NOTIFY, NOTIFY_STRIDE};
use super::shared::Shared;
use crate::bounded::{Block, at_most};
use crate::devices::host::IoEvents;
use crate::devices::pci::{CONFIG_BYTES, SavedMsix};
use crate::devices::virtio::{Activation, DeviceFault, Notify, QueueSetup, VirtioDevice, Virtqueue};
use crate::devices::{DeviceError, StillBusy};
use crate::ram::GuestRam;
use crate::record::Saved;

/// How often to look whether a device has ended that was told to.
const LOOK_AGAIN: Duration = Duration::from_micros(100);
/// Most bytes that a device saves of its own.
const MAX_DEVICE_BYTES: usize = 512 << 10;
/// Most queues of a device.
const MAX_QUEUES: usize = 255;

/// What is saved of a virtio device over PCI, whatever it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVirtio {
    /// Configuration space.
    pub config: Block<CONFIG_BYTES>,
    /// Interrupt vectors.
    pub msix: SavedMsix,
    /// Device status.
    pub status: u8,
    /// Interrupt status.
    pub isr: u8,
    /// Generation of the device's configuration.
    pub generation: u8,
    /// Vector of changes of the device's configuration.
    pub config_vector: u16,
    /// Vector of each queue.
    #[serde(deserialize_with = "at_most::<_, _, MAX_QUEUES>")]
    pub queue_vectors: Vec<u16>,
    /// What the driver has selected, accepted and set up.
    pub common: CommonConfig,
    /// What the device itself saves.
    #[serde(deserialize_with = "at_most::<_, _, MAX_DEVICE_BYTES>")]
    pub device: Vec<u8>,
}

impl Saved for SavedVirtio {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u16 = 1;
}

/// Where a device is between its driver's first word and its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It touches nothing.
    Idle,
    /// It serves its queues.
    Active,
    /// It has been told to end.
    Ending,
    /// It was active where it was saved, and is again when the machine goes on.
    Restored,
}

#[derive(Debug)]
struct State {
    common: CommonConfig,
    phase: Phase,
    /// Where the BAR is in whose notification registers the queues' events are.
    events_at: Option<u64>,
}

/// The driver's side of a device.
#[derive(Debug)]
pub(super) struct Transport {
    device: Arc<dyn VirtioDevice>,
    /// All that is offered to its driver.
    offered: u64,
    ram: Arc<GuestRam>,
    io_events: Arc<dyn IoEvents>,
    pub(super) shared: Arc<Shared>,
    queues: Vec<Arc<Virtqueue>>,
    state: Mutex<State>,
}

impl Transport {
    pub(super) fn new(
        device: Arc<dyn VirtioDevice>,
        offered: u64,
        ram: Arc<GuestRam>,
        io_events: Arc<dyn IoEvents>,
        shared: Arc<Shared>,
    ) -> std::io::Result<Self> {
        let sizes = device.queue_sizes();
        let queues = (0..).zip(sizes).map(|(index, size)| Ok(Arc::new(Virtqueue::new(index, *size)?)));
        let queues = queues.collect::<std::io::Result<_>>()?;
        let state = State { common: CommonConfig::new(sizes), phase: Phase::Idle, events_at: None };
        Ok(Self { device, offered, ram, io_events, shared, queues, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn device(&self) -> &dyn VirtioDevice {
        self.device.as_ref()
    }

    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        self.end_reset(&mut state);
        state.common.read(offset, data, self.offered, &self.shared);
    }

    /// Takes a register's new value. `bar` is where the BAR is, if it is decoded.
    pub(super) fn write_common(&self, offset: u64, data: &[u8], bar: Option<u64>) {
        let mut state = self.lock();
        if !self.end_reset(&mut state) {
            return;
        }
        match (offset as usize, data) {
            (STATUS, [0]) => self.begin_reset(&mut state),
            (STATUS, [bits]) => self.add_status(&mut state, *bits, bar),
            _ => state.common.write(offset, data, self.device.queue_sizes(), &self.shared),
        }
    }

    /// The driver notifies of this queue where no event took it.
    pub(super) fn kick(&self, queue: u64) {
        if let Some(queue) = usize::try_from(queue).ok().and_then(|queue| self.queues.get(queue)) {
            // Fails only where the event is set already.
            let _ = queue.kick().write(1);
        }
    }

    /// Sets bits of the status, but none for which the device is not ready.
    fn add_status(&self, state: &mut State, bits: u8, bar: Option<u64>) {
        let before = self.shared.status();
        let mut bits = bits & !NEEDS_RESET & !before;
        if bits & FEATURES_OK != 0 && !state.common.has_possible_features(self.offered) {
            bits &= !FEATURES_OK;
        }
        if (before | bits) & FEATURES_OK == 0 {
            bits &= !DRIVER_OK;
        }
        self.shared.add_status(bits);
        if bits & DRIVER_OK != 0 && before & NEEDS_RESET == 0 {
            self.activate(state);
            self.move_events(state, bar);
            self.device.resume();
        }
    }

    /// Hands the queues to the device, at rest.
    fn activate(&self, state: &mut State) {
        state.phase = Phase::Active;
        if let Err(fault) = self.try_activate(&state.common) {
            self.device.deactivate();
            self.shared.needs_reset(&fault);
        }
    }

    fn try_activate(&self, common: &CommonConfig) -> Result<(), DeviceFault> {
        let has_event_idx = common.driver_features >> F_EVENT_IDX & 1 == 1;
        for (queue, setup) in self.queues.iter().zip(&common.queues) {
            queue.set_up(setup, has_event_idx, &self.ram)?;
        }
        self.device.activate(Activation {
            ram: Arc::clone(&self.ram),
            features: common.driver_features,
            queues: self.queues.clone(),
            notify: Arc::clone(&self.shared) as _,
        })
    }

    fn begin_reset(&self, state: &mut State) {
        if state.phase == Phase::Active {
            self.device.deactivate();
        }
        state.phase = Phase::Ending;
        self.move_events(state, None);
        self.end_reset(state);
    }

    /// Ends a reset that has begun, if the device has ended; whether none goes on.
    fn end_reset(&self, state: &mut State) -> bool {
        if state.phase != Phase::Ending {
            return true;
        }
        if self.device.is_active() {
            return false;
        }
        self.queues.iter().for_each(|queue| queue.reset());
        state.common = CommonConfig::new(self.device.queue_sizes());
        state.phase = Phase::Idle;
        self.shared.reset();
        true
    }

    /// The guest has put the BAR there, or nowhere.
    pub(super) fn set_bar(&self, bar: Option<u64>) {
        self.move_events(&mut self.lock(), bar);
    }

    /// Has the host set the events of queues that are used when the guest writes to their registers behind `bar`. Where it does not,
    /// [`Transport::kick`] is left.
    fn move_events(&self, state: &mut State, bar: Option<u64>) {
        let wanted = bar.filter(|_| state.phase == Phase::Active);
        if state.events_at == wanted {
            return;
        }
        let used = self.queues.iter().zip(&state.common.queues).filter(|(_, setup)| setup.is_enabled);
        for (queue, _) in used {
            let register = |bar: u64| bar + NOTIFY.start + u64::from(queue.index()) * NOTIFY_STRIDE;
            // One that was refused is not there.
            let _ = state.events_at.map(|bar| self.io_events.remove(register(bar), queue.kick()));
            let added = wanted.map_or(Ok(()), |bar| self.io_events.add(register(bar), queue.kick()));
            if let Err(e) = added {
                tracing::debug!("notifications of queue {} take a vCPU's time: {e}", queue.index());
            }
        }
        state.events_at = wanted;
    }

    pub(super) fn pause(&self, deadline: Instant) -> Result<(), StillBusy> {
        self.device.pause(deadline)?;
        while !self.end_reset(&mut self.lock()) {
            if Instant::now() >= deadline {
                return Err(StillBusy);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    pub(super) fn resume(&self, bar: Option<u64>) {
        let mut state = self.lock();
        self.shared.msix.resume();
        if state.phase == Phase::Restored {
            self.activate(&mut state);
            self.move_events(&mut state, bar);
            self.shared.raise_all();
        }
        self.device.resume();
    }

    /// Back to the start, of a device at rest; whether it has ended within `limit`.
    pub(super) fn reset(&self, limit: Duration) -> bool {
        self.begin_reset(&mut self.lock());
        let has_ended = self.pause(Instant::now() + limit).is_ok();
        self.shared.msix.reset();
        self.shared.set_generation(0);
        has_ended
    }

    /// What is saved, besides configuration space, of a device at rest.
    pub(super) fn save(&self, config: Block<CONFIG_BYTES>) -> SavedVirtio {
        let mut state = self.lock();
        self.end_reset(&mut state);
        let mut common = state.common.clone();
        if state.phase == Phase::Active {
            for (setup, queue) in common.queues.iter_mut().zip(&self.queues) {
                let ring = queue.state();
                (setup.next_available, setup.next_used) = (ring.next_avail, ring.next_used);
            }
        }
        SavedVirtio {
            config,
            msix: self.shared.msix.save(),
            status: self.shared.status(),
            isr: self.shared.isr(),
            generation: self.shared.generation(),
            config_vector: self.shared.config_vector(),
            queue_vectors: (0..).zip(&self.queues).map(|(queue, _)| self.shared.queue_vector(queue)).collect(),
            common,
            device: self.device.save(),
        }
    }

    /// Why this device cannot become what was saved: the end of a sentence.
    pub(super) fn check(&self, saved: &SavedVirtio) -> Result<(), String> {
        self.shared.msix.check(&saved.msix)?;
        let (sizes, common) = (self.device.queue_sizes(), &saved.common);
        if common.queues.len() != sizes.len() || saved.queue_vectors.len() != sizes.len() {
            return Err(format!("it has {} queues, here there are {}", common.queues.len(), sizes.len()));
        }
        let possible = |(setup, most): (&QueueSetup, &u16)| setup.size.is_power_of_two() && setup.size <= *most;
        if !common.queues.iter().zip(sizes).all(possible) {
            return Err("a queue has a size that it cannot have here".into());
        }
        let offered = self.offered;
        if saved.status & FEATURES_OK != 0 && !common.has_possible_features(offered) {
            return Err(format!(
                "the features {:#x} are in use, here {offered:#x} are offered",
                common.driver_features
            ));
        }
        if saved.status & DRIVER_OK != 0 && saved.status & FEATURES_OK == 0 {
            return Err(format!("a device has no status {:#x}", saved.status));
        }
        Ok(())
    }

    /// Becomes what was saved, which [`Transport::check`] has seen, with this message control. It is at rest, and has not worked.
    pub(super) fn restore(&self, saved: &SavedVirtio, msix_control: u16) -> Result<(), DeviceError> {
        let mut state = self.lock();
        self.device.restore(&saved.device)?;
        self.shared.msix.restore(&saved.msix, msix_control);
        self.shared.set_status(saved.status);
        self.shared.set_isr(saved.isr);
        self.shared.set_generation(saved.generation);
        self.shared.set_config_vector(saved.config_vector);
        (0..).zip(&saved.queue_vectors).for_each(|(queue, vector)| self.shared.set_queue_vector(queue, *vector));
        state.common = saved.common.clone();
        let is_active = saved.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK;
        state.phase = if is_active { Phase::Restored } else { Phase::Idle };
        Ok(())
    }
}
