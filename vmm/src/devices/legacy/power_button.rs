//! The power button: an interrupt line by which a guest hears, with the generic event device of its ACPI tables, that somebody
//! outside wants it to shut down.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout::POWER_BUTTON_LINE;
use crate::devices::device::StillBusy;
use crate::devices::host::{ButtonPort, Host};
use crate::devices::{Device, DeviceDescription, DeviceError};
use crate::record::{Record, RecordError, Saved};

/// What is saved of the power button.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPowerButton {
    /// It was pressed while the guest was paused, which has not heard of it.
    pub is_pressed: bool,
}

impl Saved for SavedPowerButton {
    const KIND: &'static str = "power-button-acpi";
    const VERSION: u16 = 1;
}

#[derive(Debug, Default)]
struct State {
    is_pressed: bool,
    works: bool,
}

#[derive(Debug)]
struct PowerButton {
    description: DeviceDescription,
    line: EventFd,
    state: Mutex<State>,
}

pub(in crate::devices) fn make(
    description: &DeviceDescription,
    host: &mut Host,
) -> Result<Arc<dyn Device>, DeviceError> {
    let failed = |cause| DeviceError::Host { id: description.id.clone(), cause };
    let line = host.interrupts.line(POWER_BUTTON_LINE).map_err(failed)?;
    let button = Arc::new(PowerButton { description: description.clone(), line, state: Mutex::default() });
    host.ports.power_button = Some(Arc::clone(&button) as _);
    Ok(button)
}

impl PowerButton {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ButtonPort for PowerButton {
    fn press(&self) -> io::Result<()> {
        let mut state = self.lock();
        if state.works {
            return self.line.write(1);
        }
        state.is_pressed = true;
        Ok(())
    }
}

impl Device for PowerButton {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn pause(&self, _: Instant) -> Result<(), StillBusy> {
        self.lock().works = false;
        Ok(())
    }

    fn resume(&self) {
        let mut state = self.lock();
        state.works = true;
        if std::mem::take(&mut state.is_pressed) {
            // The counter would have to be at its limit for this to fail, and then the event is set.
            let _ = self.line.write(1);
        }
    }

    fn reset(&self) {
        self.lock().is_pressed = false;
    }

    fn save(&self) -> Result<Record, RecordError> {
        Record::of(self.description.id.as_str(), &SavedPowerButton { is_pressed: self.lock().is_pressed })
    }

    fn restore(&self, saved: &Record) -> Result<(), DeviceError> {
        let SavedPowerButton { is_pressed } = saved.read()?;
        self.lock().is_pressed = is_pressed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::table;

    fn button() -> PowerButton {
        let description = table::describe("button0", SavedPowerButton::KIND).unwrap();
        PowerButton { description, line: EventFd::new(libc::EFD_NONBLOCK).unwrap(), state: Mutex::default() }
    }

    #[test]
    fn a_guest_that_runs_hears_of_it_at_once() {
        let button = button();
        button.resume();
        button.press().unwrap();
        assert_eq!(button.line.read().unwrap(), 1);
    }

    #[test]
    fn one_that_is_paused_hears_of_it_when_it_goes_on_wherever_that_is() {
        let (here, there) = (button(), button());
        here.resume();
        here.pause(Instant::now()).unwrap();
        here.press().unwrap();
        assert!(here.line.read().is_err());
        there.restore(&here.save().unwrap()).unwrap();
        there.resume();
        assert_eq!(there.line.read().unwrap(), 1);
        there.resume();
        assert!(there.line.read().is_err(), "it hears of it twice");
    }

    #[test]
    fn a_reset_forgets_it() {
        let button = button();
        button.press().unwrap();
        button.reset();
        button.resume();
        assert!(button.line.read().is_err());
    }
}
