//! Randomness from the host.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::{text_of, tried, wait_for};
use crate::Outcome;

const DEVICE: &str = "/dev/hwrng";
const BYTES: usize = 4096;

/// Needs no argument.
pub(super) fn check(_: &str) -> Outcome {
    wait_for(DEVICE, || Path::new(DEVICE).exists().then_some(()))?;
    let current = text_of("/sys/class/misc/hw_random/rng_current")?;
    let mut bytes = vec![0; BYTES];
    File::open(DEVICE).and_then(|mut file| file.read_exact(&mut bytes)).map_err(tried(DEVICE))?;
    let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
    // Of 32,768 bits half are ones, give or take 91: ten times that is never by chance.
    let half = u32::try_from(BYTES * 4).map_err(|e| e.to_string())?;
    if ones.abs_diff(half) > 910 {
        return Err(format!("{ones} of {} bits are ones", 2 * half));
    }
    Ok(format!("bytes={BYTES} source={current}"))
}
