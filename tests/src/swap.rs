//! Swap for the trials: one zram device for all trials of a binary, beside whatever the host has.

use std::sync::{Mutex, PoisonError};

use memory_agent::ScopedZram;

/// Room for what any one trial pages out, on both sides, twice over.
const BYTES: u64 = 1 << 30;
/// How often a trial about residency is tried while others' swap disturbs it.
const ATTEMPTS: u32 = 3;

enum Device {
    NotAsked,
    There(ScopedZram),
    Unavailable(String),
}

static DEVICE: Mutex<Device> = Mutex::new(Device::NotAsked);

fn device() -> std::sync::MutexGuard<'static, Device> {
    DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sets the device up, once; why that cannot be.
pub(crate) fn unavailable() -> Option<String> {
    let mut device = device();
    if matches!(*device, Device::NotAsked) {
        // Filled first: residency is exact only on a device that frees at once, and the user's may be a disk.
        *device = match ScopedZram::with_priority(BYTES, 32767) {
            Ok(zram) => Device::There(zram),
            Err(e) => Device::Unavailable(e.to_string()),
        };
    }
    match &*device {
        Device::Unavailable(why) => Some(why.clone()),
        _ => None,
    }
}

/// Gives the device back; `Err` says why it is still there.
pub(crate) fn close() -> Result<(), String> {
    match std::mem::replace(&mut *device(), Device::NotAsked) {
        Device::There(zram) => zram.close().map_err(|e| e.to_string()),
        _ => Ok(()),
    }
}

/// Whether other swap than ours is on. When its owner ends it, the kernel brings in all pages that are there, ours too.
fn disturbed() -> bool {
    let own = match &*device() {
        Device::There(zram) => Some(zram.path()),
        _ => None,
    };
    memory_agent::active().is_ok_and(|devices| devices.iter().any(|device| Some(&device.path) != own.as_ref()))
}

/// Runs a body that is about residency, and again, a few times, if it fails while swap of others is on.
///
/// # Errors
/// The last failure.
pub fn undisturbed(mut body: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    for attempt in 1.. {
        let before = disturbed();
        match body() {
            Err(e) if attempt < ATTEMPTS && (before || disturbed()) => {
                println!("repeated, because others have swap of their own here: {e:#}");
                crate::trials::give_more_time();
            }
            end => return end,
        }
    }
    Ok(())
}
