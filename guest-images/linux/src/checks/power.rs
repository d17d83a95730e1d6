//! Power: off, once more, and the button.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use rustix::system::{RebootCommand, reboot as system_reboot};

use super::{tried, wait_for};
use crate::{Outcome, news};

/// `EV_KEY` and `KEY_POWER` (include/uapi/linux/input-event-codes.h).
const KEY_EVENT: u16 = 1;
const POWER_KEY: u16 = 116;
/// `struct input_event` on 64-bit machines: time, type, code, value.
const EVENT_BYTES: usize = 24;
/// How long to wait for somebody to press it.
const BUTTON_TIMEOUT: Duration = Duration::from_secs(120);

/// Needs no argument.
pub(super) fn off(_: &str) -> Outcome {
    end(RebootCommand::PowerOff)
}

/// Needs no argument.
pub(super) fn reboot(_: &str) -> Outcome {
    end(RebootCommand::Restart)
}

fn end(command: RebootCommand) -> Outcome {
    rustix::fs::sync();
    news("power", &format!("{command:?}"));
    system_reboot(command).map_err(|e| e.to_string())?;
    Ok(String::new())
}

/// Waits for the button, and says when it has been pressed. Needs no argument.
pub(super) fn button(_: &str) -> Outcome {
    let devices = wait_for("power button", || Some(buttons()).filter(|devices| !devices.is_empty()))?;
    let (sender, pressed) = channel();
    for device in &devices {
        let file = File::open(device).map_err(tried(device.display()))?;
        let sender = sender.clone();
        std::thread::spawn(move || hear(file, &sender));
    }
    news("power-button", "waits");
    pressed.recv_timeout(BUTTON_TIMEOUT).map_err(|_| format!("not pressed in {} s", BUTTON_TIMEOUT.as_secs()))?;
    Ok(format!("devices={}", devices.len()))
}

/// Input devices whose names say that they are power buttons.
fn buttons() -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/class/input").into_iter().flatten().flatten();
    let events = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("event"));
    let buttons = events.filter(|entry| {
        fs::read_to_string(entry.path().join("device/name")).is_ok_and(|name| name.contains("Power Button"))
    });
    buttons.map(|entry| PathBuf::from("/dev/input").join(entry.file_name())).filter(|path| path.exists()).collect()
}

fn hear(mut device: File, pressed: &Sender<()>) {
    let mut event = [0; EVENT_BYTES];
    while device.read_exact(&mut event).is_ok() {
        if is_press(&event) {
            let _ = pressed.send(());
        }
    }
}

fn is_press(event: &[u8; EVENT_BYTES]) -> bool {
    let half = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
    half(16) == KEY_EVENT && half(18) == POWER_KEY && event[20] == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_press_is_told_from_a_release_and_from_other_keys() {
        let event = |kind: u16, code: u16, value: u8| {
            let mut event = [0; EVENT_BYTES];
            event[16..18].copy_from_slice(&kind.to_le_bytes());
            event[18..20].copy_from_slice(&code.to_le_bytes());
            event[20] = value;
            event
        };
        assert!(is_press(&event(1, 116, 1)));
        for other in [event(1, 116, 0), event(1, 142, 1), event(0, 0, 0)] {
            assert!(!is_press(&other));
        }
    }
}
