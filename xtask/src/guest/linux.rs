//! The Linux guest: one of Debian's cloud kernels, an initramfs with what it needs, and a small disk.
//!
//! What was made is kept by what it was made of.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use linux_guest::{PATTERN_BYTES, PATTERN_FILE, TEST_PARAMETER, pattern};
use tempfile::TempDir;

use crate::debian::{KernelPackage, Known, known, module_name, named, plain_module, the_one_needed};
use crate::lab::{Series, cache, static_program};
use crate::step::{root, run};
use crate::{cpio, host};

/// Loaded where they are modules, in this order, each after what it needs: what devices on this monitor and on QEMU are driven by, and
/// what hears of a power button.
const MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
];
/// Small enough to be copied for each guest, and large enough for a journal.
const DISK: &str = "64M";
/// What the kernel is told besides what to check. A panic ends the guest at once.
const PARAMETERS: &str = "console=ttyS0 panic=-1";

/// The files of one.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// `vmlinuz`, as the package has it.
    pub(crate) kernel: PathBuf,
    /// A cpio archive, not compressed.
    pub(crate) initramfs: PathBuf,
    /// An ext4 file system.
    pub(crate) disk: PathBuf,
}

impl Image {
    /// The one with the newest kernel of the series, or with this package's, from the cache or made now.
    ///
    /// # Errors
    /// When the package cannot be had, or something is missing on this machine.
    pub(crate) fn get(series: Series, package: Option<&str>) -> Result<Self> {
        let cache = cache()?;
        let debian = cache.join("debian");
        let kernel = match package {
            Some(file) if file.ends_with(".deb") => KernelPackage::from_file(&debian, file),
            Some(package) => KernelPackage::get(&debian, || named(package)),
            None => KernelPackage::get(&debian, || newest(series)),
        }?;
        let recipe = Recipe::read(&kernel)?;
        let guests = cache.join("guests");
        let kept = guests.join(format!("{}-{}", kernel.name, &recipe.key()[..16]));
        if !kept.is_dir() {
            fs::create_dir_all(&guests).with_context(|| format!("cannot make {}", guests.display()))?;
            let part = TempDir::with_prefix_in("part-", &guests).context("no room for a guest")?;
            fs::copy(&kernel.image, Self::in_folder(part.path()).kernel)?;
            recipe.make_initramfs(&Self::in_folder(part.path()).initramfs)?;
            make_disk(&Self::in_folder(part.path()).disk)?;
            match fs::rename(part.path(), &kept) {
                // Another run was quicker.
                Err(_) if kept.is_dir() => {}
                result => result.with_context(|| format!("cannot keep the guest as {}", kept.display()))?,
            }
        }
        Ok(Self::in_folder(&kept))
    }

    /// The files in a folder, by their names.
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self { kernel: folder.join("vmlinuz"), initramfs: folder.join("initramfs"), disk: folder.join("disk.ext4") }
    }

    /// Copies the files to the workspace's target folder, for somebody to use: a guest writes to its disk.
    ///
    /// # Errors
    /// When there is no room.
    pub(crate) fn copy_to_target(&self, series: Series) -> Result<Self> {
        self.copy_to(&root().join("target/guest").join(format!("linux-{series}")))
    }

    /// Copies the files to a folder.
    ///
    /// # Errors
    /// When there is no room.
    pub(crate) fn copy_to(&self, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let copy = Self::in_folder(folder);
        for (from, to) in [(&self.kernel, &copy.kernel), (&self.initramfs, &copy.initramfs), (&self.disk, &copy.disk)] {
            // A guest that runs may have the old one open.
            let part = to.with_extension("part");
            fs::copy(from, &part).and_then(|_| fs::rename(&part, to)).with_context(|| to.display().to_string())?;
        }
        Ok(copy)
    }

    /// Options of `thermocline` that boot it, which does these checks then, or gives a shell.
    pub(crate) fn options(&self, checks: &[String]) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let mut parameters = PARAMETERS.to_owned();
        if !checks.is_empty() {
            parameters += &format!(" {TEST_PARAMETER}{},poweroff", checks.join(","));
        }
        let mut options: Vec<String> = ["run", "--memory", "512MiB", "--cpus", "2"].map(Into::into).into();
        options.extend(["--kernel".into(), path(&self.kernel), "--initramfs".into(), path(&self.initramfs)]);
        options.extend(["--cmdline".into(), parameters, "--disk".into(), format!("path={}", path(&self.disk))]);
        options
    }
}

/// The newest cloud kernel of a series that this machine's release of Debian has.
fn newest(series: Series) -> Result<Known> {
    let prefix = format!("linux-image-{series}.");
    let leading = [format!("linux-image-{series}-cloud-amd64"), "linux-image-cloud-amd64".to_owned()];
    let known = known(&leading.each_ref().map(String::as_str))?;
    let package = known.iter().find_map(|known| the_one_needed(&known.depends, &prefix));
    named(&package.with_context(|| {
        format!("apt knows no cloud kernel {series}: name another with --debian (`apt-cache search --names-only '^linux-image-6'` lists them)")
    })?)
}

/// What an initramfs is made of.
struct Recipe {
    kernel: String,
    /// Names and contents, in the order they are loaded.
    modules: Vec<(String, Vec<u8>)>,
    busybox: Vec<u8>,
    guest_check: Vec<u8>,
    init: Vec<u8>,
}

impl Recipe {
    fn read(kernel: &KernelPackage) -> Result<Self> {
        if let Some(missing) = MODULES.into_iter().find(|module| !kernel.modules.has(module)) {
            bail!("{} has no {missing}: name another package with --debian", kernel.name);
        }
        let files = kernel.module_files(MODULES);
        let modules = files.iter().map(|file| Ok((module_name(&file.to_string_lossy()), plain_module(file)?)));
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let busybox = host::find_program("busybox").context("there is no busybox: install busybox-static")?;
        Ok(Self {
            kernel: kernel.name.clone(),
            modules: modules.collect::<Result<_>>()?,
            busybox: read(&busybox)?,
            guest_check: read(&static_program("linux-guest", "guest-check")?)?,
            init: read(&root().join("guest-images/linux/init"))?,
        })
    }

    /// What no other recipe has.
    fn key(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let mut add = |part: &[u8]| {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part);
        };
        for part in [self.kernel.as_bytes(), DISK.as_bytes(), &self.busybox, &self.guest_check, &self.init] {
            add(part);
        }
        for (name, content) in &self.modules {
            add(name.as_bytes());
            add(content);
        }
        hash.finalize().to_hex().to_string()
    }

    fn make_initramfs(&self, archive: &Path) -> Result<()> {
        let folder = TempDir::new_in(archive.parent().unwrap_or(archive)).context("no room for an initramfs")?;
        let place = |name: &str| folder.path().join(name);
        for name in ["bin", "sbin", "dev", "modules"] {
            fs::create_dir(place(name))?;
        }
        symlink("busybox", place("bin/sh"))?;
        for (name, content) in
            [("bin/busybox", &self.busybox), ("bin/guest-check", &self.guest_check), ("init", &self.init)]
        {
            fs::write(place(name), content)?;
            fs::set_permissions(place(name), fs::Permissions::from_mode(0o755))?;
        }
        for (index, (name, content)) in self.modules.iter().enumerate() {
            fs::write(place(&format!("modules/{index:03}-{name}.ko")), content)?;
        }
        cpio::pack(folder.path(), archive)
    }
}

/// A file system with the file whose content the guest knows.
fn make_disk(image: &Path) -> Result<()> {
    let folder = TempDir::new_in(image.parent().unwrap_or(image)).context("no room for a disk")?;
    fs::write(folder.path().join(PATTERN_FILE), pattern(0, PATTERN_BYTES))?;
    let mke2fs = host::find_program("mke2fs").context("there is no mke2fs: install e2fsprogs")?;
    let mut command = Command::new(mke2fs);
    command.args(["-q", "-t", "ext4", "-b", "4096", "-L", "guest", "-d"]).arg(folder.path()).arg(image).arg(DISK);
    run(&mut command)
}

#[cfg(test)]
mod tests {
    use command_line::note;

    use super::*;

    fn recipe() -> Recipe {
        Recipe {
            kernel: "linux-image-6_1".into(),
            modules: vec![("a".into(), b"1".to_vec()), ("b".into(), b"2".to_vec())],
            busybox: b"busybox".to_vec(),
            guest_check: b"check".to_vec(),
            init: b"init".to_vec(),
        }
    }

    #[test]
    fn whatever_it_is_made_of_changes_its_key() {
        let key = recipe().key();
        assert_eq!(key, recipe().key());
        let others = [
            Recipe { kernel: "linux-image-6_2".into(), ..recipe() },
            Recipe { modules: vec![("b".into(), b"2".to_vec()), ("a".into(), b"1".to_vec())], ..recipe() },
            Recipe { modules: vec![("a1".into(), vec![]), ("b".into(), b"2".to_vec())], ..recipe() },
            Recipe { busybox: b"busyboxc".to_vec(), guest_check: b"heck".to_vec(), ..recipe() },
            Recipe { init: vec![], ..recipe() },
        ];
        for other in others {
            assert_ne!(other.key(), key);
        }
    }

    #[test]
    fn options_say_what_to_check() {
        let image = Image::in_folder(Path::new("/x"));
        let options = image.options(&["disk".into(), "ping:1.2.3.4".into()]);
        assert!(options.contains(&"console=ttyS0 panic=-1 thermocline.test=disk,ping:1.2.3.4,poweroff".to_owned()));
        assert!(image.options(&[]).contains(&"console=ttyS0 panic=-1".to_owned()));
    }

    #[test]
    fn a_disk_has_the_file_that_the_guest_looks_for() {
        if host::find_program("mke2fs").is_none() || host::find_program("debugfs").is_none() {
            note(format_args!("skipped a_disk_has_the_file_that_the_guest_looks_for: there is no e2fsprogs"));
            return;
        }
        let folder = TempDir::new().unwrap();
        let image = folder.path().join("disk");
        make_disk(&image).unwrap();
        let debugfs = host::find_program("debugfs").unwrap();
        let output = Command::new(debugfs).args(["-R", &format!("cat {PATTERN_FILE}")]).arg(&image).output().unwrap();
        assert!(output.stdout == pattern(0, PATTERN_BYTES));
    }
}
