//! Reads from the disk, straight into this program's memory, of what the host has written there.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use linux_guest::{PATTERN_BYTES, PATTERN_FILE, pattern};
use rustix::fs::OFlags;

use super::super::disk::MOUNTED;
use super::super::tried;
use super::{Aligned, Random, Shared};
use crate::Outcome;

/// Bytes of a read.
const BYTES: usize = 64 << 10;
const PAUSE: Duration = Duration::from_millis(5);

/// Reads until it is over.
pub(super) fn run(shared: &Shared) -> Outcome {
    let path = format!("{MOUNTED}/{PATTERN_FILE}");
    let expected = pattern(0, PATTERN_BYTES);
    let flags = i32::try_from(OFlags::DIRECT.bits()).map_err(|e| e.to_string())?;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(tried(&path))?;
    let mut random = Random(1);
    let mut read = Box::new(Aligned([0; BYTES]));
    while !shared.is_over() {
        let at = random.below(PATTERN_BYTES / BYTES) * BYTES;
        // What an earlier read has left there is not to be taken for this one's.
        read.0.fill(0);
        file.read_exact_at(&mut read.0, at as u64).map_err(tried(&path))?;
        if read.0 != expected[at..at + BYTES] {
            let place = read.0.iter().zip(&expected[at..]).position(|(found, expected)| found != expected);
            return Err(format!("byte {} of {path} is not what the host wrote", at + place.unwrap_or_default()));
        }
        shared.reads.fetch_add(1, Ordering::Relaxed);
        sleep(PAUSE);
    }
    Ok(String::new())
}
