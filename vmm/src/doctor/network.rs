//! Whether a guest's network interface can have an other end here.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::{Area, Findings, State, rights};

const TUN: &str = "/dev/net/tun";

pub(super) fn examine(found: &mut Findings) {
    // Opening it makes nothing: an interface comes with the ioctl that names one.
    let (state, value, consequence) = match rustix::fs::open(TUN, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => (State::Ok, "can be opened", "a guest's network interface can have a tap: run --net tap=NAME"),
        Err(Errno::NOENT | Errno::NODEV) => (
            State::Limited,
            "is not there",
            "no guest can have a network interface: modprobe tun, or pass the device into the container",
        ),
        Err(_) => (
            State::Limited,
            "may not be opened",
            "no guest can have a network interface, but with a tap that is open: run --net fd=N",
        ),
    };
    found.add(Area::Network, TUN, state, value, consequence);
    if rights::has(CapabilitySet::NET_ADMIN) {
        found.add(
            Area::Network,
            "CAP_NET_ADMIN",
            State::Ok,
            "held",
            "taps can be made: ip tuntap add dev NAME mode tap vnet_hdr",
        );
    } else {
        let consequence = "root has to make the taps: ip tuntap add dev NAME mode tap user USER vnet_hdr";
        found.add(Area::Network, "CAP_NET_ADMIN", State::Limited, "not held", consequence);
    }
}
