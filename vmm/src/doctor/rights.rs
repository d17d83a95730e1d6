//! What this process may do that others may not.

use rustix::thread::{CapabilitySet, capabilities};

use super::{Area, Findings, State};

/// What is worth having, with it and without it. None is needed to run a guest and migrate it.
const WANTED: [(CapabilitySet, &str, &str, &str); 3] = [
    (
        CapabilitySet::SYS_PTRACE,
        "CAP_SYS_PTRACE",
        "page faults of vCPUs can be handled, and another user's process examined",
        "only this user's processes can be examined; page faults of vCPUs need /dev/userfaultfd",
    ),
    (
        CapabilitySet::SYS_NICE,
        "CAP_SYS_NICE",
        "other processes' pages can be paged out (process_madvise)",
        "only own pages can be paged out, which is all that a migration does",
    ),
    (
        CapabilitySet::SYS_ADMIN,
        "CAP_SYS_ADMIN",
        "swap can be set up, as `demo` does",
        "swap must be set up by somebody else",
    ),
];

/// Whether this process has the capability.
pub(super) fn has(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

pub(super) fn examine(found: &mut Findings) {
    for (capability, name, with, without) in WANTED {
        if has(capability) {
            found.add(Area::Rights, name, State::Ok, "held", with);
        } else {
            found.add(Area::Rights, name, State::Limited, "not held", without);
        }
    }
}
