//! The lab's kernel: Debian's source package, the project's patches and configuration.
//!
//! What was built is kept by what it was built from, so a kernel is never used for other patches than its own.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use command_line::note;
use rustix::fs::{FlockOperation, flock};

use super::source::Tree;
use crate::step::root;

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Series {
    /// Debian 12's own. Has no PAGEMAP_SCAN, and of the patches the marker alone.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's, and Debian 12's from backports.
    #[value(name = "6.12")]
    V6_12,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

/// What the kernel checks of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Checks {
    /// Nothing, as on a host: to count instructions.
    None,
    /// DEBUG_VM: to test.
    Vm,
    /// KASAN, page table checks and lockdep besides: to soak.
    Kasan,
}

impl fmt::Display for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "no checks",
            Self::Vm => "DEBUG_VM",
            Self::Kasan => "KASAN",
        })
    }
}

/// Which kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    pub(crate) series: Series,
    pub(crate) flavour: Flavour,
    pub(crate) checks: Checks,
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linux {} ({}, {})", self.series, self.flavour, self.checks)
    }
}

/// With the project's patches, or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// With.
    Patched,
    /// Without: the same source and configuration.
    Stock,
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Patched => "patched",
            Self::Stock => "stock",
        })
    }
}

/// Where the lab keeps what takes long to make.
///
/// # Errors
/// When there is no home folder, or it cannot be written to.
pub(crate) fn cache() -> Result<PathBuf> {
    let folder = match (std::env::var_os("THERMOCLINE_LAB_CACHE"), std::env::var_os("XDG_CACHE_HOME")) {
        (Some(folder), _) => PathBuf::from(folder),
        (None, Some(folder)) => Path::new(&folder).join("thermocline-lab"),
        (None, None) => {
            let home = std::env::var_os("HOME").context("there is no HOME: set THERMOCLINE_LAB_CACHE to a folder")?;
            Path::new(&home).join(".cache/thermocline-lab")
        }
    };
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// The kernel's image, from the cache or built now.
///
/// # Errors
/// When it cannot be built: no source package, a patch that does not apply, a compiler's error.
pub(crate) fn build(variant: Variant) -> Result<PathBuf> {
    let recipe = Recipe::read(variant)?;
    let cache = cache()?;
    let kept = cache.join("kernels").join(recipe.key());
    let image = kept.join("bzImage");
    if image.is_file() {
        return Ok(image);
    }
    // Builds share a source tree; another one may be making this very kernel.
    let lock = File::create(cache.join("lock"))?;
    flock(&lock, FlockOperation::LockExclusive).context("the lab's cache cannot be locked")?;
    if image.is_file() {
        return Ok(image);
    }
    let started = Instant::now();
    note(format_args!("building {variant} from {} in {}", recipe.version, cache.display()));
    let tree = Tree::of(&cache, &recipe)?;
    tree.take_patches(&recipe)?;
    tree.configure(&recipe)?;
    tree.make(&["bzImage"], "the kernel does not build")?;
    fs::create_dir_all(&kept)?;
    fs::copy(tree.output().join(".config"), kept.join("config"))?;
    // Whole or not at all.
    let part = kept.join("bzImage.part");
    fs::copy(tree.output().join("arch/x86/boot/bzImage"), &part)?;
    fs::rename(part, &image)?;
    note(format_args!("built in {:.1} min", started.elapsed().as_secs_f64() / 60.0));
    Ok(image)
}

/// The version of the series' source package that is installed.
///
/// # Errors
/// When none is.
pub(super) fn source_version(series: Series) -> Result<String> {
    installed_version(&format!("linux-source-{series}"))
}

fn installed_version(package: &str) -> Result<String> {
    let asked = Command::new("dpkg-query").args(["--show", "--showformat=${Version}", package]).output();
    let version = asked.ok().filter(|output| output.status.success() && !output.stdout.is_empty());
    let version =
        version.with_context(|| format!("there is no {package}: install it with `apt-get install {package}`"))?;
    Ok(String::from_utf8_lossy(&version.stdout).trim().to_owned())
}

/// What a kernel is built from.
pub(super) struct Recipe {
    pub(super) variant: Variant,
    /// Of the source package.
    pub(super) version: String,
    /// In order, by name.
    pub(super) patches: Vec<(String, Vec<u8>)>,
    /// What is set on top of `tinyconfig`.
    pub(super) config: String,
}

impl Recipe {
    fn read(variant: Variant) -> Result<Self> {
        let Variant { series, flavour, checks } = variant;
        let version = source_version(series)?;
        let folder = root().join("host-kernel");
        let mut patches = Vec::new();
        if flavour == Flavour::Patched {
            let from = folder.join("patches").join(series.to_string());
            let entries = fs::read_dir(&from).with_context(|| format!("no patches in {}", from.display()))?;
            for entry in entries {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == "patch") {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    patches.push((name, fs::read(&path)?));
                }
            }
            patches.sort();
            ensure!(!patches.is_empty(), "no patches in {}", from.display());
        }
        let fragments: &[&str] = match (series, checks) {
            (Series::V6_12, Checks::None) => &["base", "6.12"],
            (Series::V6_12, Checks::Vm) => &["base", "6.12", "checks"],
            (Series::V6_12, Checks::Kasan) => &["base", "6.12", "kasan"],
            (Series::V6_1, Checks::None) => &["base"],
            (Series::V6_1, Checks::Vm) => &["base", "checks"],
            (Series::V6_1, Checks::Kasan) => &["base", "kasan"],
        };
        let mut config = String::new();
        for fragment in fragments {
            let path = folder.join("configs").join(fragment);
            config += &fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        }
        Ok(Self { variant, version, patches, config })
    }

    /// A folder's name that no other recipe has.
    fn key(&self) -> String {
        let mut hash = blake3::Hasher::new();
        hash.update(self.version.as_bytes()).update(b"\0").update(self.config.as_bytes());
        for (name, content) in &self.patches {
            hash.update(b"\0").update(name.as_bytes()).update(b"\0").update(content);
        }
        let hash = hash.finalize().to_hex();
        format!("{}-{}-{}", self.version, self.variant.flavour, &hash[..16])
    }

    /// The patches alone.
    pub(super) fn patches_key(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for (_, content) in &self.patches {
            hash.update(content);
        }
        hash.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_is_not_installed_is_told() {
        let e = format!("{:#}", installed_version("linux-source-1.0").unwrap_err());
        assert_eq!(e, "there is no linux-source-1.0: install it with `apt-get install linux-source-1.0`");
    }

    #[test]
    fn other_patches_are_another_kernel() {
        let recipe = |patch: &str, config: &str| Recipe {
            variant: Variant { series: Series::V6_12, flavour: Flavour::Patched, checks: Checks::Vm },
            version: "6.12".into(),
            patches: vec![("0001.patch".into(), patch.into())],
            config: config.into(),
        };
        let key = recipe("a", "x").key();
        assert_eq!(key, recipe("a", "x").key());
        assert_ne!(key, recipe("b", "x").key());
        assert_ne!(key, recipe("a", "y").key());
        assert_ne!(key, Recipe { patches: vec![], ..recipe("a", "x") }.key());
    }
}
