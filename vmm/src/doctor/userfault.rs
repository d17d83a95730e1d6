//! Whether page faults of a guest can be handled by this process.
//!
//! A vCPU's fault is a fault of the kernel, which not everybody may handle (fs/userfaultfd.c
//! `userfaultfd_syscall_allowed`).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::{Area, Findings, State, rights, sys};
use crate::host::text;

/// Features that matter here: bit, name, what it is for.
const FEATURES: [(u64, &str); 4] =
    [(1 << 5, "missing-shmem"), (1 << 10, "minor-shmem"), (1 << 12, "wp-hugetlbfs-shmem"), (1 << 15, "wp-async")];
/// What receiving pages later needs.
const LAZY: u64 = 1 << 5 | 1 << 10;
/// What makes an unpatched kernel leave marks where it paged out.
const MARKS: u64 = 1 << 12 | 1 << 15;

/// How the device can be used.
enum Device {
    Usable(OwnedFd),
    Refused(io::Error),
}

impl Device {
    fn open() -> Self {
        let open = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
        match open.and_then(|device| Ok(sys::userfaultfd_of(device.as_fd())?)) {
            Ok(fd) => Self::Usable(fd),
            Err(e) => Self::Refused(e),
        }
    }

    fn says(&self) -> &'static str {
        match self {
            Self::Usable(_) => "/dev/userfaultfd permitted",
            Self::Refused(e) if e.kind() == io::ErrorKind::NotFound => "no /dev/userfaultfd (Linux 6.1)",
            Self::Refused(_) => "/dev/userfaultfd not permitted",
        }
    }
}

/// Whether a guest's page faults can be handled, and pages that are missing or cold filled in.
pub(super) fn examine(found: &mut Findings) -> bool {
    let device = Device::open();
    let call = sys::userfaultfd(true);
    let kernel_faults = call.is_ok() || matches!(device, Device::Usable(_));
    let unprivileged = text::read("/proc/sys/vm/unprivileged_userfaultfd").as_deref() == Some("1");
    let by = match &call {
        Ok(_) if rights::has(CapabilitySet::SYS_PTRACE) => "by CAP_SYS_PTRACE",
        Ok(_) if unprivileged => "by vm.unprivileged_userfaultfd=1",
        Ok(_) => "system call",
        Err(Errno::NOSYS) => "no system call",
        Err(_) => "own faults only",
    };
    // For own faults it suffices to know what the kernel has.
    let fd = call.or_else(|e| match &device {
        Device::Usable(fd) => rustix::io::fcntl_dupfd_cloexec(fd, 0),
        Device::Refused(_) => sys::userfaultfd(false).map_err(|_| e),
    });
    let consequence = if kernel_faults {
        "page faults of vCPUs can be handled here"
    } else if fd.is_ok() {
        "page faults of vCPUs cannot be handled: give this user /dev/userfaultfd (chmod, setfacl) or CAP_SYS_PTRACE"
    } else {
        "page faults cannot be handled: use a kernel with CONFIG_USERFAULTFD, and a seccomp filter that permits it"
    };
    let state = State::ok_or(kernel_faults, State::Limited);
    found.add(Area::Userfault, "userfaultfd", state, format_args!("{by}; {}", device.says()), consequence);
    let features = fd.and_then(|fd| sys::userfault_features(fd.as_fd())).unwrap_or(0);
    let has = |wanted| features & wanted == wanted;
    let lazy = kernel_faults && has(LAZY);
    let names = names(features);
    if !names.is_empty() {
        let marks = "marks of paged-out pages are possible on this kernel as it is";
        let no_marks = "no marks of paged-out pages without a patched kernel (wp-async: Linux 6.7)";
        let consequence = if has(MARKS) { marks } else { no_marks };
        found.add(Area::Userfault, "features", State::ok_or(has(LAZY), State::Limited), names, consequence);
    }
    let (value, consequence) = if lazy {
        ("possible", "a guest can be received by post-copy here (--cold lazy, --switchover now)")
    } else {
        ("not possible", "a guest cannot be received by post-copy here (--cold lazy, --switchover now)")
    };
    found.add(Area::Userfault, "lazy destination", State::ok_or(lazy, State::Limited), value, consequence);
    lazy
}

fn names(features: u64) -> String {
    let names: Vec<_> = FEATURES.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| *name).collect();
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_named() {
        assert_eq!(names(0), "");
        assert_eq!(names(LAZY), "missing-shmem minor-shmem");
        assert_eq!(names(u64::MAX).split(' ').count(), FEATURES.len());
    }
}
