//! Writes to the disk: a ring of records, each of which the disk has confirmed before the next is written.
//!
//! A record has its number, a checksum, and content that follows from its number. What has been confirmed is there, in its slot,
//! until the record that takes its place: a lost write, one that is done again after a later one, and one that is torn are all
//! told from it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use linux_guest::stream::fill;
use rustix::fs::OFlags;

use super::super::disk::MOUNTED;
use super::super::tried;
use super::{Aligned, Random, Shared};
use crate::Outcome;

/// A record is a block of the file system's.
const RECORD_BYTES: usize = 4096;
const SLOTS: u64 = 512;
/// Number (u64) and checksum (CRC-32) of number and content, both little-endian.
const HEADER_BYTES: usize = 12;
const SEED: u64 = 0x6c6f_6700;
/// Between two records.
const PAUSE: Duration = Duration::from_millis(5);
/// After how many records one is read back from the disk.
const CHECK_EVERY: u64 = 8;

type Record = Aligned<RECORD_BYTES>;

fn path() -> String {
    format!("{MOUNTED}/log")
}

/// Writes until it is over.
pub(super) fn run(shared: &Shared) -> Outcome {
    let path = path();
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).map_err(tried(&path))?;
    let on_disk = open_direct(&path)?;
    let mut random = Random(SEED);
    let mut record = Box::new(Aligned([0; RECORD_BYTES]));
    let mut number = 0;
    while !shared.is_over() {
        make(number, &mut record);
        file.write_all_at(&record.0, number % SLOTS * RECORD_BYTES as u64).map_err(tried(&path))?;
        file.sync_all().map_err(tried(&path))?;
        number += 1;
        shared.records.store(number, Ordering::Relaxed);
        if number % CHECK_EVERY == 0 {
            let back = random.below(number.min(SLOTS) as usize) as u64;
            check(&on_disk, number - 1 - back, &mut record)?;
        }
        sleep(PAUSE);
    }
    Ok(String::new())
}

/// Checks that of so many confirmed records all are there that no later one has replaced.
pub(super) fn check_all(confirmed: u64) -> Result<(), String> {
    let file = open_direct(&path())?;
    let mut record = Box::new(Aligned([0; RECORD_BYTES]));
    (confirmed.saturating_sub(SLOTS)..confirmed).try_for_each(|number| check(&file, number, &mut record))
}

/// Past this kernel's memory.
fn open_direct(path: &str) -> Result<File, String> {
    let flags = i32::try_from(OFlags::DIRECT.bits()).map_err(|e| e.to_string())?;
    OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(tried(path))
}

/// Checks that this record is in its slot.
fn check(file: &File, number: u64, record: &mut Record) -> Result<(), String> {
    let slot = number % SLOTS;
    file.read_exact_at(&mut record.0, slot * RECORD_BYTES as u64).map_err(tried("the log"))?;
    is(record, number).map_err(|why| format!("in slot {slot}, where record {number} was confirmed: {why}"))
}

fn make(number: u64, record: &mut Record) {
    let (header, content) = record.0.split_at_mut(HEADER_BYTES);
    fill(SEED, number * RECORD_BYTES as u64, content);
    header[..8].copy_from_slice(&number.to_le_bytes());
    let sum = checksum(&header[..8], content);
    header[8..].copy_from_slice(&sum.to_le_bytes());
}

fn checksum(number: &[u8], content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(number);
    hasher.update(content);
    hasher.finalize()
}

/// Whether this is the record of this number; what it is otherwise.
fn is(record: &Record, number: u64) -> Result<(), String> {
    let (header, content) = record.0.split_at(HEADER_BYTES);
    let mut expected = Box::new(Aligned([0; RECORD_BYTES]));
    make(number, &mut expected);
    if record.0 == expected.0 {
        return Ok(());
    }
    let of = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    let (found, sum) = (of(&header[..8]), of(&header[8..]));
    Err(if sum != u64::from(checksum(&header[..8], content)) {
        format!("a record that calls itself {found}, with a wrong checksum: it is torn or has changed")
    } else if found < number {
        format!("record {found}: a later write was lost, or this one was done again")
    } else {
        format!("record {found}, of other content or not written yet")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u64) -> Box<Record> {
        let mut record = Box::new(Aligned([0; RECORD_BYTES]));
        make(number, &mut record);
        record
    }

    #[test]
    fn a_record_is_itself_and_no_other() {
        for number in [0, 1, SLOTS, u64::from(u32::MAX) + 1] {
            assert_eq!(is(&record(number), number), Ok(()));
        }
        assert!(is(&record(3), 3 + SLOTS).unwrap_err().starts_with("record 3: a later write was lost"));
        assert!(is(&record(3 + SLOTS), 3).unwrap_err().contains("not written yet"));
    }

    #[test]
    fn a_torn_record_is_told() {
        let mut torn = record(5);
        torn.0[2048..].copy_from_slice(&record(5 + SLOTS).0[2048..]);
        assert!(is(&torn, 5).unwrap_err().contains("wrong checksum"));
        let mut flipped = record(5);
        flipped.0[RECORD_BYTES - 1] ^= 1;
        assert!(is(&flipped, 5).unwrap_err().contains("wrong checksum"));
        assert!(is(&Aligned([0; RECORD_BYTES]), 5).is_err());
    }
}
