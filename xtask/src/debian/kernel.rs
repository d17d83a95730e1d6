//! A kernel out of a package: its image and its modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use command_line::note;
use tempfile::TempDir;

use super::modules::Modules;
use super::package::{self, Known, text_of};
use crate::step::run;
use crate::{apt, host};

/// A kernel's package, unpacked.
#[derive(Debug)]
pub(crate) struct KernelPackage {
    /// The package and its version.
    pub(crate) name: String,
    /// `vmlinuz`.
    pub(crate) image: PathBuf,
    /// All that it has.
    pub(crate) modules: Modules,
    folder: PathBuf,
}

impl KernelPackage {
    /// The one that `choose` names, from this folder, which keeps what was unpacked, or fetched into it now.
    ///
    /// # Errors
    /// When there is no such package, it cannot be fetched, or has no kernel in it.
    pub(crate) fn get(kept_in: &Path, choose: impl Fn() -> Result<Known>) -> Result<Self> {
        fs::create_dir_all(kept_in).with_context(|| format!("cannot make {}", kept_in.display()))?;
        ensure!(
            host::find_program("apt-get").is_some(),
            "Debian's kernels are fetched with apt-get, which is not here: \
             fetch a linux-image package elsewhere and name its file"
        );
        let attempt = || {
            let found = choose()?;
            let name = format!("{}_{}", found.package, found.version);
            let kept = kept_in.join(&name);
            if !kept.is_dir() {
                package::fetch(&found, &kept, |file| unpack(file, &kept))?;
            }
            anyhow::Ok((name, kept))
        };
        let (name, kept) = match attempt() {
            // Lists that are old name files that are gone.
            Err(why) if host::is_root() => {
                note(format_args!("{why:#}; once more with new package lists"));
                apt::update().map_err(|_| why)?;
                attempt()?
            }
            result => result?,
        };
        Self::read(name, &kept)
    }

    /// The one in a .deb file.
    ///
    /// # Errors
    /// When it cannot be read, or has no kernel in it.
    pub(crate) fn from_file(kept_in: &Path, file: &str) -> Result<Self> {
        fs::create_dir_all(kept_in).with_context(|| format!("cannot make {}", kept_in.display()))?;
        let shown = Command::new("dpkg-deb").args(["--show", "--showformat=${Package}_${Version}", file]).output();
        let name = text_of(shown.context("there is no dpkg-deb: install dpkg")?)
            .with_context(|| format!("{file} cannot be read as a Debian package"))?;
        let kept = kept_in.join(&name);
        if !kept.is_dir() {
            unpack(Path::new(file), &kept)?;
        }
        Self::read(name, &kept)
    }

    /// What an unpacked package has.
    fn read(name: String, kept: &Path) -> Result<Self> {
        let boot = fs::read_dir(kept.join("boot")).with_context(|| format!("{name} has no boot folder"))?;
        let mut images = boot.flatten().map(|entry| entry.path());
        let image =
            images.find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with("vmlinuz")));
        let image = image.with_context(|| format!("{name} has no vmlinuz"))?;
        let folder = modules_folder(kept).with_context(|| format!("{name} has no modules"))?;
        let read = |file| {
            let path = folder.join(file);
            fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}: remove {}, it is made again", path.display(), kept.display()))
        };
        let modules = Modules::parse(&read("modules.dep")?, &read("modules.builtin")?);
        Ok(Self { name, image, modules, folder })
    }

    /// Files of those that are modules among these, possibly compressed, each once and after those that it needs.
    pub(crate) fn module_files<'a>(&self, wanted: impl IntoIterator<Item = &'a str>) -> Vec<PathBuf> {
        self.modules.order(wanted).into_iter().map(|path| self.folder.join(path)).collect()
    }
}

/// Unpacks a package into a folder that is there whole or not at all, with its modules' dependencies, which otherwise its
/// installation would make.
fn unpack(file: &Path, kept: &Path) -> Result<()> {
    let folder = TempDir::new_in(kept.parent().unwrap_or(kept)).context("no room to unpack a kernel")?;
    run(Command::new("dpkg-deb").arg("--extract").arg(file).arg(folder.path()))?;
    let modules = modules_folder(folder.path())
        .with_context(|| format!("{} has no kernel modules: is it a linux-image package?", file.display()))?;
    if !modules.join("modules.dep").is_file() {
        // lib/modules/VERSION, of which it wants what is above and the version.
        let base = modules.ancestors().nth(3).unwrap_or(folder.path());
        let version = modules.file_name().unwrap_or_default();
        let depmod = host::find_program("depmod").context("there is no depmod: install kmod")?;
        run(Command::new(depmod).arg("-b").arg(base).arg(version))?;
    }
    match fs::rename(folder.path(), kept) {
        // Another run was quicker.
        Err(_) if kept.is_dir() => Ok(()),
        result => result.with_context(|| format!("cannot keep the kernel as {}", kept.display())),
    }
}

/// The only folder in `lib/modules`, wherever this release of Debian has that.
fn modules_folder(package: &Path) -> Option<PathBuf> {
    let folders = ["lib/modules", "usr/lib/modules"].map(|folder| package.join(folder));
    folders.iter().filter_map(|folder| fs::read_dir(folder).ok()?.next()?.ok()).map(|entry| entry.path()).next()
}
