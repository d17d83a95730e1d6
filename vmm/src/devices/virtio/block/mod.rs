//! The disk (VIRTIO 1.2, 5.2): raw images and block devices, read and written straight from and to guest memory by io_uring.
//!
//! | to read about | open |
//! |---|---|
//! | the image, and why it cannot be a disk | `image.rs` |
//! | the lock on it, and who has it while a guest moves | `lock.rs` |
//! | a request, and what is refused | `request.rs` |
//! | what a queue's worker does | `serve.rs` |
//! | what is done to an image, with io_uring or without | `engine.rs`, `sys.rs` |

mod engine;
mod image;
mod lock;
mod request;
mod serve;
mod sys;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use image::{DiskBackend, Image, ImageError, Opening};

use super::{Activation, DeviceFault, VirtioDevice, Worker, Workers};
use crate::devices::host::Host;
use crate::devices::{DeviceDescription, DeviceError, Handover};
use engine::{Engine, Plain};
use serve::Serving;
use sys::Ring;

/// What it is called in the table of devices.
pub const KIND: &str = "virtio-blk";
/// Its type.
const TYPE: u32 = 2;
/// What sectors are, bytes, whatever the disk's blocks are.
pub const SECTOR: u64 = 512;
/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;
/// Most queues.
pub const MAX_QUEUES: u16 = 16;
/// Most buffers of a request besides header and status.
const MAX_DATA_BUFFERS: u32 = QUEUE_SIZE as u32 - 2;
/// Most ranges of a request to discard or to write zeros.
const MAX_SEGMENTS: u32 = 32;
/// Most sectors of such a range: 1 GiB.
const MAX_ZEROED_SECTORS: u32 = 1 << 21;
/// Bytes of the configuration space up to `unused1`, `struct virtio_blk_config`.
const CONFIG_BYTES: usize = 60;

/// What the guest sees of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether it can only be read.
    pub readonly: bool,
    /// What it is addressed in, bytes.
    pub logical_block: u32,
    /// What it is written in at once, bytes.
    pub physical_block: u32,
    /// By which the guest knows it again; at most 20 bytes of it.
    pub serial: String,
    /// Number of queues.
    pub queues: u16,
}

impl BlockConfig {
    /// Why it cannot be, as the end of a sentence.
    fn wrong(&self) -> Option<&'static str> {
        let is_block = |bytes: u32| bytes.is_power_of_two() && (SECTOR as u32..=1 << 20).contains(&bytes);
        match self {
            Self { sectors, .. } if *sectors == 0 || *sectors > u64::MAX / SECTOR / 2 => {
                Some("its size is not possible")
            }
            Self { queues, .. } if !(1..=MAX_QUEUES).contains(queues) => Some("its number of queues is not possible"),
            Self { serial, .. } if serial.len() > 64 => Some("its serial number is too long"),
            _ if !is_block(self.logical_block) || !is_block(self.physical_block) => Some("its blocks are not possible"),
            _ => None,
        }
    }
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    description: DeviceDescription,
    config: BlockConfig,
    space: [u8; CONFIG_BYTES],
    queue_sizes: Vec<u16>,
    image: Arc<Image>,
    /// Whether io_uring is not to be used even where it can be had.
    plain: bool,
    workers: Workers,
}

/// The device of this description, on the image that this host gives for it.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    host: &mut Host,
) -> Result<Arc<dyn VirtioDevice>, DeviceError> {
    let refused = |cause| DeviceError::Host { id: description.id.clone(), cause };
    let why = || format!("no image is given for it here; give it with --disk path=FILE,id={}", description.id);
    let missing = || refused(io::Error::new(io::ErrorKind::NotFound, why()));
    let config: BlockConfig = description.config()?;
    let mut backend = host.backends.disks.get(&description.id).cloned().ok_or_else(missing)?;
    if backend.readonly && !config.readonly {
        let path = backend.path.display();
        let why = format!(
            "the guest may write to its disk, and {path} is to be opened for reading alone; leave out readonly"
        );
        return Err(refused(io::Error::other(why)));
    }
    // A guest that cannot write its disk needs no more, and the image is left to others that read it.
    backend.readonly |= config.readonly;
    let opening = if host.backends.are_elsewhere { Opening::Arriving } else { Opening::Ours };
    let image = backend.open_for(opening).map_err(|e| refused(io::Error::other(e.to_string())))?;
    let block = Block::new(description, image)?;
    if opening == Opening::Arriving {
        block.image.look_for_source();
    }
    Ok(Arc::new(block))
}

impl BlockConfig {
    /// What a guest sees of an image.
    pub fn of(image: &Image, serial: String, queues: u16) -> Self {
        Self {
            sectors: image.bytes / SECTOR,
            readonly: image.backend.readonly,
            logical_block: image.logical_block,
            physical_block: image.physical_block.max(image.logical_block),
            serial,
            queues,
        }
    }
}

impl Block {
    /// A disk of this description on an image that is as large.
    ///
    /// # Errors
    /// When the description cannot be, or the image is another one.
    pub fn new(description: &DeviceDescription, image: Image) -> Result<Self, DeviceError> {
        let config: BlockConfig = description.config()?;
        if let Some(why) = config.wrong() {
            let (id, kind) = (description.id.clone(), description.kind.clone());
            return Err(DeviceError::Config { id, kind, why: why.into() });
        }
        let wrong = |why: String| description.refused(io::Error::other(why));
        if image.bytes / SECTOR != config.sectors {
            let (path, here) = (image.backend.path.display(), image.bytes / SECTOR);
            return Err(wrong(format!("the guest's disk has {} sectors, {path} has {here}", config.sectors)));
        }
        if image.backend.readonly && !config.readonly {
            let path = image.backend.path.display();
            return Err(wrong(format!("the guest may write to its disk, and {path} is opened for reading alone")));
        }
        if image.alignment > config.logical_block {
            let (path, here, block) = (image.backend.path.display(), image.alignment, config.logical_block);
            let why = format!(
                "the guest's blocks have {block} bytes, and {path} takes {here} at once with direct I/O; leave out direct"
            );
            return Err(wrong(why));
        }
        Ok(Self {
            description: description.clone(),
            space: space(&config),
            queue_sizes: vec![QUEUE_SIZE; config.queues.into()],
            config,
            image: Arc::new(image),
            plain: false,
            workers: Workers::default(),
        })
    }

    fn engine(&self, activation: &Activation) -> Box<dyn Engine> {
        let (image, ram) = (&self.image, &activation.ram);
        let ring =
            if self.plain { Err(std::io::ErrorKind::Unsupported.into()) } else { Ring::new(image, ram, QUEUE_SIZE) };
        match ring {
            Ok(ring) => Box::new(ring),
            Err(e) => {
                let path = image.backend.path.display();
                tracing::warn!("disk {path}: a request at a time, since io_uring is not to be had: {e}");
                Box::new(Plain::new(image, ram))
            }
        }
    }
}

/// The configuration space of such a disk.
fn space(config: &BlockConfig) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &config.sectors.to_le_bytes());
    put(12, &MAX_DATA_BUFFERS.to_le_bytes());
    put(20, &config.logical_block.to_le_bytes());
    let blocks = (config.physical_block / config.logical_block).max(1);
    put(24, &[blocks.trailing_zeros() as u8]);
    put(26, &(blocks as u16).to_le_bytes());
    put(34, &config.queues.to_le_bytes());
    for (sectors, segments) in [(36, 40), (48, 52)] {
        put(sectors, &MAX_ZEROED_SECTORS.to_le_bytes());
        put(segments, &MAX_SEGMENTS.to_le_bytes());
    }
    put(44, &(config.logical_block / SECTOR as u32).to_le_bytes());
    put(56, &[1]);
    space
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        TYPE
    }

    fn features(&self) -> u64 {
        let mut bits = vec![VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_FLUSH];
        bits.extend(if self.config.readonly {
            vec![VIRTIO_BLK_F_RO]
        } else {
            vec![VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]
        });
        bits.extend((self.config.queues > 1).then_some(VIRTIO_BLK_F_MQ));
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.space, offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceFault> {
        let mut workers = Vec::new();
        for queue in activation.queues.iter().filter(|queue| queue.is_ready()) {
            let serving = Serving::new(&activation, queue, &self.config, &self.image, self.engine(&activation));
            let name = format!("{}-{}", self.description.id, queue.index());
            workers.push(Worker::new(&name, &activation, std::slice::from_ref(queue), serving)?);
        }
        self.workers.set(workers);
        Ok(())
    }

    fn workers(&self) -> &Workers {
        &self.workers
    }

    fn hand_over(&self, step: Handover, deadline: Instant) -> Result<(), DeviceError> {
        let image = &self.image;
        let done = match step {
            Handover::Prepare if image.backend.readonly => Ok(()),
            Handover::Prepare => image.sync(deadline),
            Handover::Offer => image.offer(deadline),
            Handover::Take => image.take(),
            Handover::Claim => image.claim(),
            Handover::Keep => {
                image.keep();
                Ok(())
            }
            Handover::Leave => {
                image.let_go();
                Ok(())
            }
        };
        let id = || self.description.id.clone();
        done.map_err(|e| DeviceError::Handover { id: id(), why: e.to_string() })
    }
}
