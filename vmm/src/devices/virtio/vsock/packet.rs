//! The header of a packet (VIRTIO 1.2, 5.10.6).

use vm_memory::GuestMemoryError;

use crate::devices::virtio::Buffers;
use crate::ram::GuestRam;

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// The host's context id (`VMADDR_CID_HOST`).
pub(super) const HOST_CID: u64 = 2;
/// The one type of socket: a stream (`VIRTIO_VSOCK_TYPE_STREAM`).
const STREAM: u16 = 1;
/// Most bytes behind a header, either way (Linux, `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub(super) const MOST_DATA: usize = 64 << 10;

/// What a packet is (`enum virtio_vsock_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

const OPS: [Op; 7] =
    [Op::Request, Op::Response, Op::Reset, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest];

/// Flags of [`Op::Shutdown`]: the sender receives no more, sends no more.
pub(super) const RECEIVES_NO_MORE: u32 = 1;
pub(super) const SENDS_NO_MORE: u32 = 2;

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A header, of which both ends are known to be the guest's and the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ports: Ports,
    /// Bytes behind it.
    pub(super) length: u32,
    /// None for what no one knows.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    /// How many bytes the sender has room for, and how many it has taken out of there since the beginning.
    pub(super) buffer: u32,
    pub(super) forwarded: u32,
}

fn u32_at(bytes: &[u8; HEADER], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Header {
    /// The header at the beginning of what the guest sends. None if it is not from this guest to the host, or is not all there.
    pub(super) fn read(ram: &GuestRam, buffers: &Buffers, guest_cid: u64) -> Result<Option<Self>, GuestMemoryError> {
        let mut bytes = [0; HEADER];
        if buffers.read(ram, &mut bytes)? < HEADER {
            return Ok(None);
        }
        let is_ours = u64_at(&bytes, 0) == guest_cid && u64_at(&bytes, 8) == HOST_CID;
        let kind = u16::from_le_bytes([bytes[28], bytes[29]]);
        let number = u16::from_le_bytes([bytes[30], bytes[31]]);
        let op = usize::from(number).checked_sub(1).and_then(|number| OPS.get(number).copied());
        let header = Self {
            ports: Ports { guest: u32_at(&bytes, 16), host: u32_at(&bytes, 20) },
            length: u32_at(&bytes, 24),
            op: op.filter(|_| kind == STREAM),
            flags: u32_at(&bytes, 32),
            buffer: u32_at(&bytes, 36),
            forwarded: u32_at(&bytes, 40),
        };
        Ok(is_ours.then_some(header))
    }

    /// Its bytes, from the host to the guest.
    pub(super) fn bytes(&self, guest_cid: u64) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let op = self.op.and_then(|op| OPS.iter().position(|known| *known == op)).map_or(0, |at| at as u16 + 1);
        bytes[..8].copy_from_slice(&HOST_CID.to_le_bytes());
        bytes[8..16].copy_from_slice(&guest_cid.to_le_bytes());
        let words = [(16, self.ports.host), (20, self.ports.guest), (24, self.length)];
        let more = [(32, self.flags), (36, self.buffer), (40, self.forwarded)];
        for (at, word) in words.into_iter().chain(more) {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[28..30].copy_from_slice(&STREAM.to_le_bytes());
        bytes[30..32].copy_from_slice(&op.to_le_bytes());
        bytes
    }
}
