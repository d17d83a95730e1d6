//! The machine this runs on.

use std::path::{Path, PathBuf};

/// Whether this is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this is a CI run, where nothing may be left out that this machine could do.
pub(crate) fn is_ci() -> bool {
    std::env::var("CI").is_ok_and(|ci| ci == "true")
}

/// Whether virtual machines can run here.
pub(crate) fn has_kvm() -> bool {
    Path::new("/dev/kvm").exists()
}

/// The program of that name, where a shell or root's shell would find it.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let roots_own = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let candidates = std::env::split_paths(&path).chain(roots_own).map(|folder| folder.join(name));
    candidates.into_iter().find(|candidate| candidate.is_file())
}
