//! A disk with a file system: what the host wrote is read, what the guest writes is read back from the disk.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use linux_guest::{PATTERN_BYTES, PATTERN_FILE, pattern};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{text_of, tried, wait_for};
use crate::Outcome;

/// The disk that is meant where none is named.
pub(super) const DEFAULT: &str = "vda";
/// Where its file system is while a check works on it.
pub(super) const MOUNTED: &str = "/mnt";
/// What the guest writes, bytes.
const WRITTEN_BYTES: usize = 4 << 20;

/// The argument is the disk's name, such as `vda`.
pub(super) fn check(argument: &str) -> Outcome {
    let name = if argument.is_empty() { DEFAULT } else { argument };
    mounted(name, read_and_write)?;
    let attribute = |file: &str| text_of(&format!("/sys/block/{name}/{file}"));
    let queues = fs::read_dir(format!("/sys/block/{name}/mq")).map_err(tried("mq"))?.count();
    Ok(format!(
        "bytes={WRITTEN_BYTES} sectors={} block={} cache={} queues={queues}",
        attribute("size")?,
        attribute("queue/physical_block_size")?,
        attribute("queue/write_cache")?.replace(' ', "-"),
    ))
}

/// Does something while the file system of this disk is mounted.
pub(super) fn mounted<T>(name: &str, work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let device = format!("/dev/{name}");
    wait_for(&device, || Path::new(&device).exists().then_some(()))?;
    fs::create_dir_all(MOUNTED).map_err(tried(MOUNTED))?;
    mount(&device, MOUNTED, c"ext4", MountFlags::empty(), None)
        .map_err(tried(format!("{device} cannot be mounted")))?;
    let result = work();
    let unmounted = unmount(MOUNTED, UnmountFlags::empty()).map_err(tried(format!("{device} cannot be unmounted")));
    let done = result?;
    unmounted?;
    Ok(done)
}

/// What is read from here on comes from the disk, and not from this kernel's memory.
pub(super) fn drop_caches() -> Result<(), String> {
    fs::write("/proc/sys/vm/drop_caches", "3").map_err(tried("drop_caches"))
}

fn read_and_write() -> Result<(), String> {
    let of_host = fs::read(format!("{MOUNTED}/{PATTERN_FILE}")).map_err(tried("what the host wrote"))?;
    if of_host != pattern(0, PATTERN_BYTES) {
        return Err("what the host wrote is not what is read".into());
    }
    let path = format!("{MOUNTED}/written");
    let written = pattern(1, WRITTEN_BYTES);
    let mut file = File::create(&path).map_err(tried(&path))?;
    file.write_all(&written).and_then(|()| file.sync_all()).map_err(tried(&path))?;
    drop(file);
    drop_caches()?;
    let read = fs::read(&path).map_err(tried(&path))?;
    if read != written {
        return Err("what was written is not what is read back".into());
    }
    fs::remove_file(&path).map_err(tried(&path))
}
