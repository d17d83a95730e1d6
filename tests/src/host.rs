//! What this host offers, and what a trial needs of it.

use std::path::Path;
use std::process::{Command, Stdio};

use harness::host::{is_root, may_be_used};

use crate::linux;

/// Something that not every host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `/dev/kvm`, for reading and writing.
    Kvm,
    /// Root.
    Root,
    /// A zram swap device of one's own.
    Zram,
    /// Network namespaces, and `ip` and `tc` to set them up.
    Network,
    /// A tap interface, and `ip` to make it.
    Tap,
    /// A file system of one's own.
    Mount,
    /// A KVM whose guests run ring 0 natively, and the files of a Linux guest.
    LinuxGuest,
    /// QEMU, as a peer.
    Qemu,
}

impl Need {
    /// Whether this host cannot have it, so that nothing is left out that it could do.
    pub(crate) fn cannot_be_had(self) -> bool {
        self == Self::LinuxGuest && emulates_ring_0()
    }
}

/// Whether KVM here runs without the processor's help, and emulates what a guest's kernel does, too slowly for Linux.
fn emulates_ring_0() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

/// Why `need` is not met here.
pub(crate) fn missing(need: Need) -> Option<String> {
    match need {
        Need::Kvm => match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
            Ok(_) => None,
            Err(e) => Some(format!("no /dev/kvm: {e}")),
        },
        Need::Root => (!is_root()).then(|| "not root".into()),
        Need::Zram => may_be_used().err().or_else(crate::swap::unavailable),
        Need::Network => may_be_used().err().or_else(|| ["ip", "tc"].into_iter().find_map(no_iproute)),
        Need::Tap => may_be_used().err().or_else(|| no_iproute("ip")).or_else(|| {
            let tun = Path::new("/dev/net/tun");
            (!tun.exists()).then(|| "no /dev/net/tun: `modprobe tun`".into())
        }),
        Need::Mount => may_be_used().err().or_else(|| harness::mount::PROGRAMS.into_iter().find_map(no_program)),
        Need::LinuxGuest if emulates_ring_0() => {
            Some("only in the lab: KVM here emulates ring 0, too slowly for Linux".into())
        }
        Need::LinuxGuest => linux::Image::get().err().map(|e| format!("{e:#}")),
        Need::Qemu => {
            let found =
                Command::new(linux::qemu()).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            found.err().map(|e| format!("no QEMU (package qemu-system-x86): {e}"))
        }
    }
}

fn no_program(program: &str) -> Option<String> {
    let found = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.err().map(|e| format!("no `{program}` (packages e2fsprogs, util-linux): {e}"))
}

fn no_iproute(program: &str) -> Option<String> {
    let found = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.err().map(|e| format!("no `{program}` (package iproute2): {e}"))
}
