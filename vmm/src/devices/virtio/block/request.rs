//! What a driver asks of a disk (VIRTIO 1.2, 5.2.6), checked against the disk before anything is done.

use std::collections::VecDeque;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::{BlockConfig, MAX_SEGMENTS, MAX_ZEROED_SECTORS, SECTOR};
use crate::devices::virtio::{Buffers, Chain, DeviceFault};
use crate::ram::GuestRam;

/// Bytes of what stands in front of a request: type, reserved, sector.
const HEADER: u64 = 16;
/// Bytes of one range to discard or to write zeros to: sector, number, flags.
const SEGMENT: u64 = 16;
/// The one flag of a range (`VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`).
const UNMAP: u32 = 1;
/// Most bytes that one request reads or writes.
const MOST_BYTES: u64 = 64 << 20;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Read into these buffers from this byte on.
    Read(u64, Buffers),
    /// Write these buffers from this byte on.
    Write(u64, Buffers),
    /// Have what was written before last.
    Flush,
    /// Say which disk it is, here.
    Identify(Buffers),
    /// Make holes of these ranges: start and length in bytes.
    Discard(VecDeque<(u64, u64)>),
    /// Make zeros of these ranges.
    Zero(VecDeque<(u64, u64)>),
    /// Nothing but to answer with this status.
    Refuse(u8),
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// By which its chain is given back.
    pub(super) head: u16,
    /// Where its status goes: one byte.
    pub(super) status: Buffers,
    pub(super) work: Work,
}

impl Request {
    /// What a chain asks for.
    ///
    /// # Errors
    /// When it has no header, or no place for the status.
    pub(super) fn new(queue: u16, chain: Chain, ram: &GuestRam, config: &BlockConfig) -> Result<Self, DeviceFault> {
        let Chain { head, mut readable, mut writable } = chain;
        let wrong = |why: &str| DeviceFault::Queue { queue, why: format!("the request at {head}: {why}") };
        let mut header = [0; HEADER as usize];
        let read = readable.split_to(HEADER).read(ram, &mut header).map_err(|e| wrong(&e.to_string()))?;
        if read < header.len() {
            return Err(wrong("it has no whole header"));
        }
        let Some(data) = writable.len().checked_sub(1) else { return Err(wrong("it has no place for a status")) };
        let data = writable.split_to(data);
        let work = work(&header, readable, data, ram, config);
        Ok(Self { head, status: writable, work: work.unwrap_or_else(Work::Refuse) })
    }
}

/// What a header asks for, or the status that refuses it.
fn work(header: &[u8], readable: Buffers, writable: Buffers, ram: &GuestRam, config: &BlockConfig) -> Result<Work, u8> {
    let (kind, sector) = (u32_at(header, 0), u64_at(header, 8));
    match kind {
        VIRTIO_BLK_T_IN => Ok(Work::Read(place(sector, writable.len(), config)?, writable)),
        VIRTIO_BLK_T_FLUSH => Ok(Work::Flush),
        VIRTIO_BLK_T_GET_ID if writable.len() >= u64::from(VIRTIO_BLK_ID_BYTES) => Ok(Work::Identify(writable)),
        VIRTIO_BLK_T_GET_ID => Err(VIRTIO_BLK_S_IOERR as u8),
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if config.readonly => {
            Err(VIRTIO_BLK_S_IOERR as u8)
        }
        VIRTIO_BLK_T_OUT => Ok(Work::Write(place(sector, readable.len(), config)?, readable)),
        VIRTIO_BLK_T_DISCARD => ranges(&readable, ram, config, 0).map(Work::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => ranges(&readable, ram, config, UNMAP).map(Work::Zero),
        _ => Err(VIRTIO_BLK_S_UNSUPP as u8),
    }
}

/// Where `bytes` bytes from a sector on begin, if all of them are there and can be had at once.
fn place(sector: u64, bytes: u64, config: &BlockConfig) -> Result<u64, u8> {
    let is_possible = bytes.is_multiple_of(SECTOR) && bytes <= MOST_BYTES && is_inside(sector, bytes / SECTOR, config);
    if is_possible { Ok(sector * SECTOR) } else { Err(VIRTIO_BLK_S_IOERR as u8) }
}

fn is_inside(sector: u64, sectors: u64, config: &BlockConfig) -> bool {
    sector.checked_add(sectors).is_some_and(|end| end <= config.sectors)
}

fn ranges(buffers: &Buffers, ram: &GuestRam, config: &BlockConfig, flags: u32) -> Result<VecDeque<(u64, u64)>, u8> {
    let failed = VIRTIO_BLK_S_IOERR as u8;
    if !buffers.len().is_multiple_of(SEGMENT) || buffers.len() > u64::from(MAX_SEGMENTS) * SEGMENT {
        return Err(failed);
    }
    let mut bytes = vec![0; buffers.len() as usize];
    buffers.read(ram, &mut bytes).map_err(|_| failed)?;
    let range = |segment: &[u8]| {
        let (sector, sectors) = (u64_at(segment, 0), u32_at(segment, 8));
        if u32_at(segment, 12) & !flags != 0 {
            return Err(VIRTIO_BLK_S_UNSUPP as u8);
        }
        let is_possible = sectors <= MAX_ZEROED_SECTORS && is_inside(sector, sectors.into(), config);
        if is_possible { Ok((sector * SECTOR, u64::from(sectors) * SECTOR)) } else { Err(failed) }
    };
    bytes.chunks_exact(SEGMENT as usize).map(range).filter(|range| !matches!(range, Ok((_, 0)))).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}
