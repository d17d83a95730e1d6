//! Which file a mapping of another process is of: found by device and inode, or left out and named.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]

mod support;

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::Command;

use memory_agent::{PAGE_SIZE, PageCache, Probe, Process, Target, TargetError};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, set_capabilities};
use support::Memory;

const PAGES: u64 = 16;

/// Runs a body in a thread whose mounts are its own, and go with it.
fn with_own_mounts(body: impl FnOnce(&Path) + Send) {
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: no descriptors are unshared.
            #[allow(unsafe_code, reason = "this thread's mounts become its own")]
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
            mount(&["--make-rprivate", "/"]);
            body(folder.path());
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn mount(arguments: &[&str]) {
    let status = Command::new("mount").args(arguments).status().unwrap();
    assert!(status.success(), "mount {arguments:?}: {status}");
}

/// A file in a tmpfs of its own.
fn file_in_new_tmpfs(folder: &Path, name: &str) -> File {
    let mounted = folder.join(name);
    std::fs::create_dir(&mounted).unwrap();
    mount(&["-t", "tmpfs", name, mounted.to_str().unwrap()]);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(mounted.join(name)).unwrap();
    file.set_len(PAGES * PAGE_SIZE).unwrap();
    file
}

/// The calling thread may look into processes, but not follow the links of `map_files`.
fn without_map_files() {
    let own = capabilities(None).unwrap();
    let effective = own.effective & !(CapabilitySet::SYS_ADMIN | CapabilitySet::CHECKPOINT_RESTORE);
    set_capabilities(None, rustix::thread::CapabilitySets { effective, ..own }).unwrap();
}

#[test]
fn a_file_with_the_same_number_in_another_tmpfs_is_not_taken() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped a_file_with_the_same_number_in_another_tmpfs_is_not_taken: mounting needs root");
        return;
    }
    with_own_mounts(|folder| {
        use std::os::unix::fs::MetadataExt;
        // Open before the right one, and found first.
        let other = file_in_new_tmpfs(folder, "same-number-other");
        let ram = Memory::of_file(file_in_new_tmpfs(folder, "same-number-ram"), PAGES);
        assert_eq!(other.metadata().unwrap().ino(), ram.file.metadata().unwrap().ino());
        (0..PAGES).for_each(|page| ram.write(page, page + 1));
        without_map_files();

        let process = Process::open(std::process::id()).unwrap();
        let found = process.shared_memory("same-number-ram").unwrap();
        assert_eq!(PageCache.residency(&found.memories[0], 0..PAGES).unwrap().counts().resident, PAGES);
        assert!(found.left_out.is_empty(), "{:?}", found.left_out);

        // By its path, when no descriptor is of that file.
        drop(found);
        let ram = ram.without_file();
        let found = process.shared_memory("same-number-ram").unwrap();
        assert_eq!(PageCache.residency(&found.memories[0], 0..PAGES).unwrap().counts().resident, PAGES);

        // Mapped only: the other one is not taken for it.
        drop(found);
        std::fs::remove_file(folder.join("same-number-ram/same-number-ram")).unwrap();
        let found = process.shared_memory("same-number-ram");
        assert!(matches!(found, Err(TargetError::NoRight { .. })), "{found:?}");
        assert!(ram.holds(3, 4));
    });
}

#[test]
fn memory_that_is_left_out_is_named() {
    let name = "left-out-is-named";
    let memory = Memory::new(name, PAGES);
    let huge = memfd_create(format!("{name}-huge"), MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB);
    let huge = match huge {
        Ok(file) => File::from(file),
        Err(e) => {
            eprintln!("skipped memory_that_is_left_out_is_named: this kernel has no huge pages: {e}");
            return;
        }
    };
    const HUGE: u64 = 2 << 20;
    huge.set_len(HUGE).unwrap();
    // Mapped, without a page of it: none need be set aside.
    let huge = Memory::of_file(huge, HUGE / PAGE_SIZE);
    let behind_end = Memory::new(&format!("{name}-behind-end"), PAGES);
    behind_end.file.set_len(0).unwrap();

    let process = Process::open(std::process::id()).unwrap();
    let found = process.shared_memory(name).unwrap();
    assert_eq!(found.memories.len(), 1);
    assert_eq!(found.memories[0].mapping().pages(), memory.pages);
    let mut left_out: Vec<_> = found.left_out.iter().map(|left| (left.name.as_str(), left.bytes)).collect();
    left_out.sort_unstable();
    let names = [format!("/memfd:{name}-behind-end"), format!("/memfd:{name}-huge")];
    assert_eq!(left_out, [(names[0].as_str(), PAGES * PAGE_SIZE), (names[1].as_str(), HUGE)]);
    let why = found.left_out.iter().find(|left| left.name == names[1]).unwrap();
    assert!(matches!(why.why, TargetError::NotSharedMemory), "{}", why.why);
    // The tool says so, to people and in JSON.
    let mut map = support::tool();
    map.args(["map", "--json", "--pid", &std::process::id().to_string(), "--name", name]);
    let output = map.output().unwrap();
    let (said, printed) = (String::from_utf8(output.stderr).unwrap(), String::from_utf8(output.stdout).unwrap());
    assert!(names.iter().all(|name| said.contains(&format!("left out {name} ("))), "{said}");
    let map: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((map["memories"].as_array().unwrap().len(), map["left_out"].as_array().unwrap().len()), (1, 2), "{map}");

    // With nothing else there, it is the error.
    assert!(matches!(process.shared_memory(&names[1]), Err(TargetError::NotSharedMemory)));
    drop(huge);
}

#[test]
fn what_is_no_memory_is_not_spoken_of() {
    // A file on a disk, shared.
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(PAGES * PAGE_SIZE).unwrap();
    let _mapped = Memory::of_file(file, PAGES);
    let memory = Memory::new("no-memory-is-not-spoken-of", PAGES);
    let found = Process::open(std::process::id()).unwrap().shared_memory("").unwrap();
    assert!(found.memories.iter().any(|found| found.mapping().pages() == memory.pages));
    let folder = env!("CARGO_MANIFEST_DIR");
    assert!(!found.left_out.iter().any(|left| left.name.starts_with(folder)), "{:?}", found.left_out);
}
