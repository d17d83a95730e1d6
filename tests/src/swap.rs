//! Swap for the trials: one zram device for all trials of a binary, beside whatever the host has.

use std::sync::{Mutex, PoisonError};

use harness::disturbance::{damon_is_on, swap_of_others};
use memory_agent::ScopedZram;

/// Room for what any one trial pages out, on both sides, twice over.
const BYTES: u64 = 1 << 30;
/// How often a trial about residency is tried while somebody disturbs it.
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

/// Has the device, again when it was given back; `Err` says why there is none.
///
/// # Errors
/// When the host has none to give.
pub fn open() -> Result<(), String> {
    unavailable().map_or(Ok(()), Err)
}

/// Gives the device back, whose pages come in; the next trial that needs one makes another.
///
/// # Errors
/// When it is still there.
pub fn close() -> Result<(), String> {
    match std::mem::replace(&mut *device(), Device::NotAsked) {
        Device::There(zram) => zram.close().map_err(|e| e.to_string()),
        _ => Ok(()),
    }
}

/// Who else moves pages in and out here. When the owner of other swap ends it, the kernel brings in all pages that are
/// there, ours too; and a host with DAMON's proactive reclaim pages out whatever idles, ours too.
fn disturbed() -> Option<&'static str> {
    let device = device();
    let own = match &*device {
        Device::There(zram) => Some(zram.path()),
        _ => None,
    };
    if !swap_of_others(own.as_deref()).is_empty() {
        return Some("others have swap of their own here");
    }
    damon_is_on().then_some("DAMON is on here and may page out what idles")
}

/// Runs a body that is about residency, and again, a few times, if it fails while somebody else moves pages.
///
/// # Errors
/// The last failure.
pub fn undisturbed(mut body: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    for attempt in 1.. {
        let before = disturbed();
        match body() {
            Err(e) if attempt < ATTEMPTS => {
                let Some(why) = before.or_else(disturbed) else { return Err(e) };
                println!("repeated, because {why}: {e:#}");
                crate::trials::give_more_time();
            }
            end => return end,
        }
    }
    Ok(())
}
