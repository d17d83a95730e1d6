//! Where cold pages go.

use memory_agent::{ByteSize, MemoryGroup, SwapDevice, SwapKind};

use super::{Area, Findings, State};
use crate::host::text;

/// A swap device with less than this left is as good as full.
const ALMOST_FULL: u64 = 16 << 20;

/// The active swap devices.
pub(super) fn examine(found: &mut Findings) -> Vec<SwapDevice> {
    let devices = match memory_agent::active() {
        Ok(devices) => devices,
        Err(e) => {
            found.add(Area::Swap, "swap", State::Limited, "unknown", e);
            return Vec::new();
        }
    };
    if devices.is_empty() {
        let load = if std::path::Path::new("/sys/class/zram-control").exists() { "" } else { "modprobe zram; " };
        found.add(
            Area::Swap,
            "swap",
            State::Limited,
            "none",
            format_args!(
                "nothing gets cold: set some up ({load}zramctl --find --size 4G, then mkswap and swapon on what it \
                 names); `demo` sets up its own"
            ),
        );
        return devices;
    }
    for device in &devices {
        let (state, consequence) = consequence(device);
        found.add(Area::Swap, &device.path.display().to_string(), state, value(device), consequence);
    }
    zswap(found);
    group_limit(found);
    devices
}

fn value(device: &SwapDevice) -> String {
    let kind = match device.kind {
        SwapKind::Zram => "zram",
        SwapKind::Partition => "partition",
        SwapKind::File => "file",
        SwapKind::Other => "unknown kind",
    };
    let used = if device.used_bytes == 0 { "unused".into() } else { format!("{} used", ByteSize(device.used_bytes)) };
    format!("{kind}, {}, {used}, priority {}", ByteSize(device.size_bytes), device.priority)
}

fn consequence(device: &SwapDevice) -> (State, &'static str) {
    match (device.free_bytes() < ALMOST_FULL, device.frees_at_once()) {
        (true, _) => (State::Limited, "full: nothing more can be paged out to it"),
        (false, true) => (State::Ok, "a page that is paged out leaves memory at once"),
        (false, false) => (
            State::Limited,
            "a page that is paged out stays in the swap cache until the kernel needs the memory, or memory.reclaim is asked",
        ),
    }
}

/// Whether any of the devices keeps pages in the swap cache after they were paged out.
pub(super) fn any_keeps(devices: &[SwapDevice]) -> bool {
    devices.iter().any(|device| !device.frees_at_once())
}

/// Compressed memory before the device.
fn zswap(found: &mut Findings) {
    match text::read("/sys/module/zswap/parameters/enabled").as_deref() {
        Some("Y" | "1") => {
            let how = "pages are compressed in memory before they go to a device, and each frees its own page at once";
            found.add(Area::Swap, "zswap", State::Ok, "on", how);
        }
        Some(_) => found.add(Area::Swap, "zswap", State::Ok, "off", "pages go straight to the device"),
        None => found.add(Area::Swap, "zswap", State::Ok, "not in this kernel", "pages go straight to the device"),
    }
}

/// A control group, or one above it, can be kept from swap that the host has.
fn group_limit(found: &mut Findings) {
    let Some(limit) = MemoryGroup::own().and_then(|group| group.swap_limit()) else { return };
    let (state, consequence) = match limit.max {
        0 => {
            (State::Limited, "nothing can be swapped out: raise that group's memory.swap.max (systemd: MemorySwapMax)")
        }
        _ => (State::Ok, "no more than this of the group's guests can be swapped out"),
    };
    let value = format!("{}, {} used, by {}", ByteSize(limit.max), ByteSize(limit.used), limit.group.display());
    found.add(Area::Swap, "memory.swap.max", state, value, consequence);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: SwapKind, used_bytes: u64) -> SwapDevice {
        SwapDevice { path: "/dev/x".into(), kind, size_bytes: 1 << 30, used_bytes, priority: -2 }
    }

    #[test]
    fn a_device_says_what_becomes_of_a_page() {
        assert_eq!(consequence(&device(SwapKind::Zram, 0)).0, State::Ok);
        assert!(consequence(&device(SwapKind::File, 0)).1.contains("swap cache"));
        assert!(consequence(&device(SwapKind::Zram, 1 << 30)).1.starts_with("full"));
        // More used than there is: the two are read one after the other.
        assert!(consequence(&device(SwapKind::Zram, u64::MAX)).1.starts_with("full"));
        assert_eq!(value(&device(SwapKind::Partition, 12 << 20)), "partition, 1 GiB, 12 MiB used, priority -2");
    }
}
