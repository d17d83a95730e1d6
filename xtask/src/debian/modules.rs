//! A kernel's modules: what each needs, and their files.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// A module's file as it is loaded: not compressed.
///
/// # Errors
/// When it cannot be read, or is compressed by something else than xz.
pub(crate) fn plain_module(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => fs::read(path).with_context(|| path.display().to_string()),
        Some("xz") => {
            let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output();
            let output = output.context("there is no xz: install xz-utils")?;
            ensure!(output.status.success(), "{} cannot be decompressed", path.display());
            Ok(output.stdout)
        }
        _ => bail!("{}: modules are known that are plain or compressed with xz", path.display()),
    }
}

/// A module's name, however its file is called: `kvm_amd` of `kernel/arch/x86/kvm/kvm-amd.ko.xz`.
pub(crate) fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split_once(".ko").map_or(file, |(name, _)| name).replace('-', "_")
}

/// What a kernel has as modules or built in.
#[derive(Debug)]
pub(crate) struct Modules {
    /// By name: its path, and the paths of those that it needs, as `modules.dep` has them.
    loadable: BTreeMap<String, (String, Vec<String>)>,
    built_in: HashSet<String>,
}

impl Modules {
    /// From `modules.dep` (`PATH: PATH PATH…`) and `modules.builtin` (one path a line).
    pub(crate) fn parse(dependencies: &str, built_in: &str) -> Self {
        let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
        let loadable = lines.map(|(path, needs)| {
            (module_name(path), (path.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
        });
        Self { loadable: loadable.collect(), built_in: built_in.lines().map(module_name).collect() }
    }

    /// Whether it is there, as either.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.loadable.contains_key(name) || self.built_in.contains(name)
    }

    /// Paths of those that are modules, each once and after those that it needs.
    pub(crate) fn order<'a>(&self, wanted: impl IntoIterator<Item = &'a str>) -> Vec<&str> {
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

    /// As in Debian's 6.1, where nothing of virtio is built in.
    #[test]
    fn what_is_needed_by_what_is_needed_comes_before_it() {
        let modules = Modules::parse(
            "d/virtio_blk.ko: d/virtio_ring.ko d/virtio.ko\nd/virtio.ko:\nd/virtio_ring.ko: d/virtio.ko\n\
             d/virtio_pci.ko: d/virtio_pci_modern_dev.ko d/virtio_ring.ko d/virtio.ko\nd/virtio_pci_modern_dev.ko:\n",
            "",
        );
        assert_eq!(
            modules.order(["virtio_blk", "virtio_pci"]).into_iter().map(module_name).collect::<Vec<_>>(),
            ["virtio", "virtio_ring", "virtio_blk", "virtio_pci_modern_dev", "virtio_pci"]
        );
    }
}
