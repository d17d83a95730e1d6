//! Debian's own kernels: fetched as packages, unpacked and not installed, and their modules in the order they load in.
//!
//! Installing one would change what this machine boots next.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};
use command_line::note;
use tempfile::TempDir;

use super::kernel::{self, Series};
use crate::step::run;
use crate::{apt, host};

/// Without these it is no host: `/dev/kvm`, swap, and a disk.
const NEEDED: [&str; 4] = ["kvm_amd", "zram", "virtio_pci", "virtio_blk"];
/// What is loaded besides where it is a module: zram's compressors, shared folders, loop devices, and networks. The kernel
/// cannot load them later: there is no modprobe inside.
const WANTED: [&str; 15] = [
    "lzo",
    "lzo_rle",
    "lz4",
    "lz4hc",
    "zstd",
    "deflate",
    SHARED_FOLDER[0],
    SHARED_FOLDER[1],
    "loop",
    "virtio_net",
    "tun",
    "veth",
    "bridge",
    "vhost_net",
    "sch_tbf",
];
const SHARED_FOLDER: [&str; 2] = ["9p", "9pnet_virtio"];

/// A kernel out of a package.
#[derive(Debug)]
pub(super) struct Kernel {
    /// The package and its version.
    pub(super) name: String,
    pub(super) image: PathBuf,
    /// Those that are loaded, possibly compressed, each after those that it needs.
    pub(super) modules: Vec<PathBuf>,
    /// Whether it can mount the folder that the machine shares. Debian's cloud kernels cannot.
    pub(super) has_shared_folder: bool,
}

/// The kernel of this package (a name or a .deb file), or of the one that goes with the series; from the cache or fetched now.
///
/// # Errors
/// When there is no such package, it cannot be fetched, or it is not a kernel that can be a host.
pub(super) fn get(package: Option<&str>, series: Series) -> Result<Kernel> {
    let cache = kernel::cache()?.join("debian");
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    if let Some(file) = package.filter(|package| package.ends_with(".deb")) {
        let shown = Command::new("dpkg-deb").args(["--show", "--showformat=${Package}_${Version}", file]).output();
        let name = text_of(shown.context("there is no dpkg-deb: install dpkg")?)
            .with_context(|| format!("{file} cannot be read as a Debian package"))?;
        let kept = cache.join(&name);
        if !kept.is_dir() {
            unpack(Path::new(file), &kept)?;
        }
        return Kernel::read(name, &kept);
    }
    ensure!(
        host::find_program("apt-get").is_some(),
        "Debian's kernels are fetched with apt-get, which is not here: \
         fetch a linux-image package elsewhere and name its file, --debian=FILE.deb"
    );
    let attempt = || {
        let found = package.map_or_else(|| default_package(series), package_named)?;
        let name = format!("{}_{}", found.package, found.version);
        let kept = cache.join(&name);
        if !kept.is_dir() {
            fetch(&found, &kept)?;
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
    Kernel::read(name, &kept)
}

/// What apt knows of a package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    package: String,
    version: String,
    depends: String,
}

/// All versions of these packages, the newest of each first.
fn known(packages: &[&str]) -> Result<Vec<Known>> {
    let shown = Command::new("apt-cache").arg("show").args(packages).output();
    // It fails when it knows none of them.
    Ok(parse_known(&String::from_utf8_lossy(&shown.context("apt-cache cannot be started")?.stdout)))
}

fn parse_known(text: &str) -> Vec<Known> {
    let mut all: Vec<Known> = Vec::new();
    for line in text.lines() {
        match line.split_once(": ") {
            Some(("Package", name)) => all.push(Known { package: name.into(), ..Known::default() }),
            Some((field, value)) => {
                let Some(last) = all.last_mut() else { continue };
                match field {
                    "Version" => last.version = value.into(),
                    "Depends" => last.depends = value.into(),
                    _ => {}
                }
            }
            None => {}
        }
    }
    all
}

fn package_named(package: &str) -> Result<Known> {
    known(&[package])?.into_iter().next().with_context(|| {
        format!("apt knows no package {package}: `apt-cache search --names-only '^linux-image-6'` lists kernels")
    })
}

/// The cloud kernel of the series. Of 6.12 the one made from the source that the lab builds its own kernels from, so that they
/// can be compared.
fn default_package(series: Series) -> Result<Known> {
    let instead = "name another with --debian=PACKAGE (`apt-cache search --names-only '^linux-image-6'` lists them)";
    match series {
        Series::V6_12 => {
            let source = kernel::source_version(series)?;
            let listed = Command::new("apt-cache").args(["pkgnames", "linux-image-6.12."]).output();
            let listed = text_of(listed.context("apt-cache cannot be started")?).unwrap_or_default();
            let names: Vec<_> = listed.lines().filter(|name| name.ends_with("-cloud-amd64")).collect();
            let found = if names.is_empty() { vec![] } else { known(&names)? };
            let found = found.into_iter().find(|known| known.version == source);
            found
                .with_context(|| format!("there is no cloud kernel of linux-source-6.12's version {source}: {instead}"))
        }
        Series::V6_1 => {
            let newest = known(&["linux-image-cloud-amd64"])?.into_iter().next();
            let package = newest.and_then(|known| kernel_in(&known.depends, "linux-image-6.1."));
            let package =
                package.with_context(|| format!("linux-image-cloud-amd64 does not lead to a 6.1 kernel: {instead}"))?;
            package_named(&package)
        }
    }
}

/// The package with this prefix among what another depends on.
fn kernel_in(depends: &str, prefix: &str) -> Option<String> {
    let names = depends.split([',', '|']).filter_map(|one| one.split_whitespace().next());
    names.into_iter().find(|name| name.starts_with(prefix)).map(str::to_owned)
}

/// Fetches a package and unpacks it.
fn fetch(package: &Known, kept: &Path) -> Result<()> {
    let folder = TempDir::new_in(kept.parent().unwrap_or(kept)).context("no room for a kernel's package")?;
    let Known { package: name, version, .. } = package;
    let mut apt = Command::new("apt-get");
    // Root downloads as another user, who cannot write here; apt would warn that it does not.
    apt.args(["--quiet=2", "--option", "APT::Sandbox::User=root", "download"]).arg(format!("{name}={version}"));
    run(apt.current_dir(folder.path())).with_context(|| {
        format!("cannot fetch {name}: is there a network? Or fetch it elsewhere and name its file, --debian=FILE.deb")
    })?;
    let files = fs::read_dir(folder.path())?.flatten().map(|entry| entry.path());
    let file = files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    unpack(&file.with_context(|| format!("apt-get fetched nothing for {name}"))?, kept)
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

impl Kernel {
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
        if let Some(missing) = NEEDED.into_iter().find(|module| !modules.has(module)) {
            bail!("{name} has no {missing}, without which it is no host: name another package with --debian=PACKAGE");
        }
        let order = modules.order(NEEDED.into_iter().chain(WANTED));
        let paths = order.into_iter().map(|path| folder.join(path)).collect();
        let has_shared_folder = SHARED_FOLDER.iter().all(|module| modules.has(module));
        Ok(Self { name, image, modules: paths, has_shared_folder })
    }
}

/// A module's file as it is loaded: not compressed.
///
/// # Errors
/// When it cannot be read, or is compressed by something else than xz.
pub(super) fn plain_module(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => fs::read(path).with_context(|| path.display().to_string()),
        Some("xz") => {
            let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output();
            let output = output.context("there is no xz: install xz-utils")?;
            ensure!(output.status.success(), "{} cannot be decompressed", path.display());
            Ok(output.stdout)
        }
        _ => bail!("{}: the lab knows modules that are plain or compressed with xz", path.display()),
    }
}

/// A module's name, however its file is called: `kvm_amd` of `kernel/arch/x86/kvm/kvm-amd.ko.xz`.
pub(super) fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split_once(".ko").map_or(file, |(name, _)| name).replace('-', "_")
}

/// What a kernel has as modules or built in.
struct Modules {
    /// By name: its path, and the paths of those that it needs, as `modules.dep` has them.
    loadable: BTreeMap<String, (String, Vec<String>)>,
    built_in: HashSet<String>,
}

impl Modules {
    /// From `modules.dep` (`PATH: PATH PATH…`) and `modules.builtin` (one path a line).
    fn parse(dependencies: &str, built_in: &str) -> Self {
        let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
        let loadable = lines.map(|(path, needs)| {
            (module_name(path), (path.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
        });
        Self { loadable: loadable.collect(), built_in: built_in.lines().map(module_name).collect() }
    }

    fn has(&self, name: &str) -> bool {
        self.loadable.contains_key(name) || self.built_in.contains(name)
    }

    /// Paths of those that are modules, each once and after those that it needs.
    fn order<'a>(&self, wanted: impl IntoIterator<Item = &'a str>) -> Vec<&str> {
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in wanted {
            self.add(name, &mut seen, &mut order);
        }
        order
    }

    fn add<'a>(&'a self, name: &str, seen: &mut HashSet<&'a str>, order: &mut Vec<&'a str>) {
        let Some((path, needs)) = self.loadable.get(name) else { return };
        if !seen.insert(path) {
            return;
        }
        for need in needs {
            self.add(&module_name(need), seen, order);
        }
        order.push(path);
    }
}

/// What a program printed, if it went well and printed something.
fn text_of(output: Output) -> Option<String> {
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/arch/x86/kvm/kvm.ko.xz: kernel/virt/lib/irqbypass.ko.xz
kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz kernel/virt/lib/irqbypass.ko.xz
kernel/virt/lib/irqbypass.ko.xz:
kernel/mm/zsmalloc.ko.xz:
kernel/drivers/block/zram/zram.ko.xz: kernel/mm/zsmalloc.ko.xz
";

    fn modules() -> Modules {
        Modules::parse(DEPENDENCIES, "kernel/drivers/virtio/virtio_pci.ko\nkernel/crypto/lzo-rle.ko\n")
    }

    #[test]
    fn modules_have_names_whatever_their_files_are_called() {
        assert_eq!(module_name("kernel/arch/x86/kvm/kvm-amd.ko.xz"), "kvm_amd");
        assert_eq!(module_name("virtio_blk.ko"), "virtio_blk");
        let modules = modules();
        assert_eq!(modules.loadable.len(), 5);
        assert!(["kvm_amd", "zram", "virtio_pci", "lzo_rle"].iter().all(|name| modules.has(name)));
        assert!(!modules.has("9p") && !modules.has("kvm-amd"));
    }

    #[test]
    fn what_is_needed_is_loaded_first_and_once() {
        assert_eq!(
            modules().order(["kvm_amd", "virtio_pci", "nothing", "zram", "kvm"]),
            [
                "kernel/virt/lib/irqbypass.ko.xz",
                "kernel/arch/x86/kvm/kvm.ko.xz",
                "kernel/arch/x86/kvm/kvm-amd.ko.xz",
                "kernel/mm/zsmalloc.ko.xz",
                "kernel/drivers/block/zram/zram.ko.xz",
            ]
        );
    }

    #[test]
    fn modules_that_need_each_other_come_to_an_end() {
        let modules = Modules::parse("a.ko: b.ko\nb.ko: a.ko\n", "");
        assert_eq!(modules.order(["a"]), ["b.ko", "a.ko"]);
    }

    #[test]
    fn a_metapackage_leads_to_a_kernel() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
                    Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nDescription: Linux: for clouds\n\
                    \nPackage: linux-image-cloud-amd64\nVersion: 6.1.176-1\n";
        let known = parse_known(text);
        assert_eq!(known.len(), 2);
        assert_eq!((known[0].version.as_str(), known[1].version.as_str()), ("6.1.192-2", "6.1.176-1"));
        let kernel = kernel_in(&known[0].depends, "linux-image-6.1.");
        assert_eq!(kernel.as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(kernel_in(&known[0].depends, "linux-image-6.12."), None);
    }
}
