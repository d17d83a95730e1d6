//! The lab's initramfs: busybox, the programs that set up swap, and an `/init` that mounts everything, runs a script, and
//! ends the machine with a code.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::{Builder, TempDir, TempPath};

use super::kernel;
use crate::step::run;
use crate::{cpio, debian, host};

/// Programs that are called by their names, and whose options busybox's do not have.
const PROGRAMS: [&str; 5] = ["mkswap", "swapon", "swapoff", "losetup", "ip"];

/// What the kernel starts.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/sbin:/usr/sbin:/bin:/usr/bin HOME=/root CI=true
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /var/tmp /root /lab
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t devpts devpts /dev/pts 2>/dev/null
for folder in /tmp /run /dev/shm; do mount -t tmpfs tmp $folder; done
problem() { echo "LAB-PROBLEM $*" > /dev/ttyS1; }
for module in /modules/*.ko; do
    [ -f "$module" ] || continue
    insmod "$module" || problem "$module cannot be loaded"
done
mount -t cgroup2 cgroup /sys/fs/cgroup && echo +memory > /sys/fs/cgroup/cgroup.subtree_control
if [ -d /programs ]; then
    # The root may be a tmpfs, which is shared memory and can be swapped: programs of a host are on neither.
    mount -t ramfs lab /lab && mv /programs/* /lab || problem "no programs"
else
    mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=262144 lab /lab || problem "no shared folder"
fi
ip link set lo up
hostname lab
if grep -q lab-shell /proc/cmdline; then
    cd /lab
    setsid cttyhack sh
    code=0
else
    # A console of its own: what is run may show the messages of another kernel, and this one's are looked at.
    sh /run.sh > /dev/ttyS1 2>&1
    code=$?
fi
echo "LAB-DONE $code" > /dev/ttyS1
sync
# isa-debug-exit ends QEMU with twice this and one.
printf "\\$(printf %o $code)" | dd of=/dev/port bs=1 seek=244 2>/dev/null
poweroff -f
"#;

/// What it has besides.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Contents<'a> {
    /// Loaded first, in this order.
    pub(super) modules: &'a [PathBuf],
    /// What `/lab` has a copy of, where the kernel cannot mount the folder that the machine shares.
    pub(super) programs: Option<&'a Path>,
}

/// Makes one that runs this script, in a file that goes with what is returned.
///
/// # Errors
/// When a program is missing.
pub(super) fn make(script: &str, contents: Contents<'_>) -> Result<TempPath> {
    let cache = kernel::cache()?;
    let temporary = TempDir::new_in(&cache).context("no room for the lab's initramfs")?;
    let folder = temporary.path();
    for name in ["bin", "sbin", "dev", "lib", "lib64", "usr/bin", "usr/sbin"] {
        fs::create_dir_all(folder.join(name))?;
    }
    let busybox = host::find_program("busybox").context("there is no busybox: install busybox-static")?;
    fs::copy(busybox, folder.join("bin/busybox"))?;
    symlink("busybox", folder.join("bin/sh"))?;
    let mut libraries = BTreeSet::new();
    for name in PROGRAMS {
        let program = host::find_program(name)
            .with_context(|| format!("there is no {name}: install util-linux, mount and iproute2"))?;
        libraries.extend(libraries_of(Command::new("ldd").arg(&program))?);
        fs::copy(program, folder.join("sbin").join(name))?;
    }
    for library in libraries {
        let place = folder.join(library.strip_prefix("/").unwrap_or(&library));
        fs::create_dir_all(place.parent().unwrap_or(folder))?;
        fs::copy(&library, place)?;
    }
    let init = folder.join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    fs::write(folder.join("run.sh"), script)?;
    if !contents.modules.is_empty() {
        fs::create_dir(folder.join("modules"))?;
    }
    for (index, module) in contents.modules.iter().enumerate() {
        let name = debian::module_name(&module.to_string_lossy());
        fs::write(folder.join(format!("modules/{index:03}-{name}.ko")), debian::plain_module(module)?)?;
    }
    if let Some(programs) = contents.programs {
        fs::create_dir(folder.join("programs"))?;
        run(Command::new("cp").arg("--recursive").arg(programs.join(".")).arg(folder.join("programs")))?;
    }
    let archive = Builder::new().suffix(".cpio").tempfile_in(&cache)?.into_temp_path();
    cpio::pack(folder, &archive)?;
    Ok(archive)
}

/// The shared libraries that a program needs, its loader among them; by `ldd`, which has been told the program.
///
/// # Errors
/// When there is no `ldd`.
pub(super) fn libraries_of(ldd: &mut Command) -> Result<Vec<PathBuf>> {
    let output = ldd.output().context("ldd cannot be started")?;
    Ok(parse_ldd(&String::from_utf8_lossy(&output.stdout)))
}

fn parse_ldd(text: &str) -> Vec<PathBuf> {
    let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    paths.map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_by_their_paths() {
        let text = "\tlinux-vdso.so.1 (0x7ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let found = parse_ldd(text);
        assert_eq!(found, [Path::new("/lib/x86_64-linux-gnu/libc.so.6"), Path::new("/lib64/ld-linux-x86-64.so.2")]);
        assert!(parse_ldd("\tnot a dynamic executable\n").is_empty());
    }
}
