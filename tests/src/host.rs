//! What this host offers, and what a trial needs of it.

use std::process::{Command, Stdio};

use harness::host::{is_root, may_be_used};

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
        Need::Network => may_be_used().err().or_else(|| {
            ["ip", "tc"].into_iter().find_map(|program| {
                let found = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
                found.err().map(|e| format!("no `{program}` (package iproute2): {e}"))
            })
        }),
    }
}
