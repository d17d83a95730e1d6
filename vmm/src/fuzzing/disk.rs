//! A disk of two queues, on an image in memory.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::queues_of;
use crate::devices::host::Backends;
use crate::devices::table;
use crate::devices::virtio::block::{BlockConfig, DiskBackend, KIND, SECTOR};

/// Its size: small, so that requests at its end are likely.
const SECTORS: u64 = 64;

/// One run with a disk, of which the first byte says whether it can be written.
pub fn disk(data: &[u8]) {
    let (readonly, data) = data.split_first().map_or((false, data), |(first, rest)| (first & 1 == 1, rest));
    let image = memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&image, SECTORS * SECTOR).unwrap();
    let config = BlockConfig {
        sectors: SECTORS,
        readonly,
        logical_block: SECTOR as u32,
        physical_block: 4096,
        serial: "serial".into(),
        queues: 2,
    };
    let description = table::describe("disk0", KIND).unwrap().with_config(&config).unwrap();
    let path = format!("/proc/self/fd/{}", image.as_raw_fd()).into();
    let backend = DiskBackend { path, readonly, direct: false, is_raw: true };
    let disks = BTreeMap::from([(description.id.clone(), backend)]);
    queues_of(&description, &Backends { disks, ..Backends::default() }, data);
}
