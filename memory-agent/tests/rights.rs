//! Who is told which pages are in memory: the kernel hides it from those who may not write the file, and calls every page
//! resident. It decides by owner, mode, groups, access control lists, capabilities and user namespaces.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]

mod support;

use std::fs::{File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use memory_agent::{Mapping, PAGE_SIZE, TargetError};
use rustix::fs::{Gid, Uid, XattrFlags, setxattr};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_keep_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use support::ReadOnly;
use tempfile::NamedTempFile;

const USER: u32 = 4711;
const GROUP: u32 = 4712;
const PAGES: u64 = 4;

/// A file in tmpfs whose first page is written; the others are holes.
fn file(owner: u32, group: u32, mode: u32) -> NamedTempFile {
    let file = NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(PAGES * PAGE_SIZE).unwrap();
    file.as_file().write_all_at(&[1; PAGE_SIZE as usize], 0).unwrap();
    chown(file.path(), Some(owner), Some(group)).unwrap();
    file.as_file().set_permissions(Permissions::from_mode(mode)).unwrap();
    file
}

/// Checks that the calling thread gets a mapping of the file when the kernel tells it which pages are in memory, and an error
/// when it does not; whether it does.
fn is_told(path: &Path) -> bool {
    let file = File::open(path).unwrap();
    let map = ReadOnly::new(&file, PAGES);
    let is_told = !map.is_in_memory(PAGES - 1);
    assert!(map.is_in_memory(0));
    match Mapping::new(file.as_fd(), 0, map.address(), PAGES * PAGE_SIZE) {
        Ok(_) => assert!(is_told, "mincore lies, and is believed"),
        Err(TargetError::NotWritable) => assert!(!is_told, "mincore tells, and is not asked"),
        Err(e) => panic!("{e}"),
    }
    is_told
}

/// Who a thread is: its groups, user and capabilities.
fn as_user(groups: &[u32], user: u32, capabilities: CapabilitySet, body: impl FnOnce() -> bool + Send) -> bool {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let groups: Vec<_> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
            set_keep_capabilities(true).unwrap();
            set_thread_groups(&groups).unwrap();
            let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
            set_thread_res_gid(group, group, group).unwrap();
            set_thread_res_uid(user, user, user).unwrap();
            let inheritable = CapabilitySet::empty();
            set_capabilities(None, CapabilitySets { effective: capabilities, permitted: capabilities, inheritable })
                .unwrap();
            body()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// An access control list that lets `user` write, as the kernel stores it (include/uapi/linux/posix_acl_xattr.h).
fn access_for(user: u32) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    // Owner, the user, group, mask, others: tag, rights, who.
    let entries = [(0x01_u16, 6_u16, NOBODY), (0x02, 6, user), (0x04, 4, NOBODY), (0x10, 6, NOBODY), (0x20, 4, NOBODY)];
    let entry = |(tag, rights, who): (u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &who.to_le_bytes()].concat()
    };
    [2_u32.to_le_bytes().to_vec(), entries.map(entry).concat()].concat()
}

fn needs_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped {test}: becoming another user needs root");
    }
    root
}

#[test]
fn whoever_may_write_is_told() {
    if !needs_root("whoever_may_write_is_told") {
        return;
    }
    let none = CapabilitySet::empty();
    let of_root = file(0, 0, 0o644);
    assert!(is_told(of_root.path()), "its owner");
    assert!(!as_user(&[], USER, none, || is_told(of_root.path())), "anybody");
    assert!(as_user(&[], USER, CapabilitySet::DAC_OVERRIDE, || is_told(of_root.path())), "who may write all files");
    assert!(as_user(&[], USER, CapabilitySet::FOWNER, || is_told(of_root.path())), "who is as an owner of all files");

    let own = file(USER, USER, 0o444);
    assert!(as_user(&[], USER, none, || is_told(own.path())), "its owner, who may not even write it");
    assert!(!as_user(&[], 0, none, || is_told(own.path())), "root without capabilities");
    let all = file(0, 0, 0o646);
    assert!(as_user(&[], USER, none, || is_told(all.path())), "anybody, who may write it");

    let of_group = file(0, GROUP, 0o664);
    assert!(as_user(&[GROUP + 1, GROUP], USER, none, || is_told(of_group.path())), "a supplementary group");
    assert!(!as_user(&[GROUP + 1], USER, none, || is_told(of_group.path())), "another group");
    // A group that may less than others.
    let not_group = file(0, GROUP, 0o646);
    assert!(!as_user(&[GROUP], USER, none, || is_told(not_group.path())), "a group that may not");

    let listed = file(0, 0, 0o644);
    match setxattr(listed.path(), "system.posix_acl_access", &access_for(USER), XattrFlags::empty()) {
        Err(rustix::io::Errno::OPNOTSUPP) => eprintln!("access control lists are not tested: tmpfs has none here"),
        set => {
            set.unwrap();
            assert!(as_user(&[], USER, none, || is_told(listed.path())), "who is in the list");
            assert!(!as_user(&[], USER + 1, none, || is_told(listed.path())), "who is not in the list");
        }
    }
}

/// The file that this program, started again as root of a user namespace, is to look at.
const FILE: &str = "MEMORY_AGENT_TESTS_RIGHTS_FILE";

#[test]
fn root_of_a_user_namespace_is_told_of_its_own_files() {
    if let Some(path) = std::env::var_os(FILE) {
        assert!(rustix::process::geteuid().is_root());
        println!("told: {}", is_told(Path::new(&path)));
        return;
    }
    const TEST: &str = "root_of_a_user_namespace_is_told_of_its_own_files";
    if !needs_root(TEST) {
        return;
    }
    let inside = |path: &Path| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user"]).arg(std::env::current_exe().unwrap());
        let output = command.args(["--exact", TEST, "--nocapture"]).env(FILE, path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        said.contains("told: true")
    };
    let (own, other) = (file(0, 0, 0o644), file(USER, USER, 0o644));
    assert!(inside(own.path()), "its own file");
    assert!(!inside(other.path()), "a file of somebody whom its namespace does not know");
}
