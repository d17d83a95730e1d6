//! Debian's own kernels as hosts, which have modules.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::kernel::{self, Series};
use crate::debian::{KernelPackage, Known, known, named, packages_with, the_one_needed};

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

/// A kernel that can be a host.
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
    let package = match package {
        Some(file) if file.ends_with(".deb") => KernelPackage::from_file(&cache, file),
        Some(package) => KernelPackage::get(&cache, || named(package)),
        None => KernelPackage::get(&cache, || default_package(series)),
    }
    .context("no kernel (one that was fetched elsewhere does as well: --debian=FILE.deb)")?;
    Kernel::of(package)
}

/// The cloud kernel of the series. Of 6.12 the one made from the source that the lab builds its own kernels from, so that they
/// can be compared.
fn default_package(series: Series) -> Result<Known> {
    let instead = "name another with --debian=PACKAGE (`apt-cache search --names-only '^linux-image-6'` lists them)";
    match series {
        Series::V6_12 => {
            let source = kernel::source_version(series)?;
            let names = packages_with("linux-image-6.12.", "-cloud-amd64")?;
            let found = known(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
            let found = found.into_iter().find(|known| known.version == source);
            found
                .with_context(|| format!("there is no cloud kernel of linux-source-6.12's version {source}: {instead}"))
        }
        Series::V6_1 => {
            let newest = known(&["linux-image-cloud-amd64"])?.into_iter().next();
            let package = newest.and_then(|known| the_one_needed(&known.depends, "linux-image-6.1."));
            let package =
                package.with_context(|| format!("linux-image-cloud-amd64 does not lead to a 6.1 kernel: {instead}"))?;
            named(&package)
        }
    }
}

impl Kernel {
    /// The parts of a package that a host loads.
    fn of(package: KernelPackage) -> Result<Self> {
        let modules = &package.modules;
        if let Some(missing) = NEEDED.into_iter().find(|module| !modules.has(module)) {
            bail!(
                "{} has no {missing}, without which it is no host: name another package with --debian=PACKAGE",
                package.name
            );
        }
        let has_shared_folder = SHARED_FOLDER.iter().all(|module| modules.has(module));
        let modules = package.module_files(NEEDED.into_iter().chain(WANTED));
        Ok(Self { name: package.name, image: package.image, modules, has_shared_folder })
    }
}
