//! The lab's kernel: Debian's source package, the project's patches and configuration.
//!
//! What was built is kept by what it was built from, so a kernel is never used for other patches than its own.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};

use crate::step::{root, shown};

/// Which of Debian's kernels.
const SERIES: &str = "6.12";
/// The option that the patches bring, which a stock kernel does not know.
const OWN_OPTION: &str = "CONFIG_PTE_MARKER_PAGEOUT";
/// How often to say that the build goes on.
const SAY_EVERY: Duration = Duration::from_secs(30);

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
pub(super) fn cache() -> Result<PathBuf> {
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
pub(crate) fn build(flavour: Flavour) -> Result<PathBuf> {
    let recipe = Recipe::read(flavour)?;
    let cache = cache()?;
    // Builds share a source tree.
    let lock = File::create(cache.join("lock"))?;
    flock(&lock, FlockOperation::LockExclusive).context("the lab's cache cannot be locked")?;
    let kept = cache.join("kernels").join(recipe.key());
    let image = kept.join("bzImage");
    if image.is_file() {
        return Ok(image);
    }
    let started = Instant::now();
    eprintln!("building Linux {} ({flavour}) in {}", recipe.version, cache.display());
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
    eprintln!("built in {:.1} min", started.elapsed().as_secs_f64() / 60.0);
    Ok(image)
}

/// What a kernel is built from.
struct Recipe {
    flavour: Flavour,
    /// Of the source package.
    version: String,
    /// In order, by name.
    patches: Vec<(String, Vec<u8>)>,
    config: String,
}

impl Recipe {
    fn read(flavour: Flavour) -> Result<Self> {
        let package = format!("linux-source-{SERIES}");
        let asked = Command::new("dpkg-query").args(["--show", "--showformat=${Version}", &package]).output();
        let version = asked.ok().filter(|output| output.status.success());
        let version =
            version.with_context(|| format!("there is no {package}: install it with `apt-get install {package}`"))?;
        let folder = root().join("host-kernel");
        let mut patches = Vec::new();
        if flavour == Flavour::Patched {
            let from = folder.join("patches").join(SERIES);
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
        let config = fs::read_to_string(folder.join("config")).context("host-kernel/config")?;
        let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
        Ok(Self { flavour, version, patches, config })
    }

    fn key(&self) -> String {
        let mut hash = blake3::Hasher::new();
        hash.update(self.version.as_bytes()).update(b"\0").update(self.config.as_bytes());
        for (name, content) in &self.patches {
            hash.update(b"\0").update(name.as_bytes()).update(b"\0").update(content);
        }
        let hash = hash.finalize().to_hex();
        format!("{}-{}-{}", self.version, self.flavour, &hash[..16])
    }

    /// The patches alone.
    fn patches_key(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for (_, content) in &self.patches {
            hash.update(content);
        }
        hash.finalize().to_hex().to_string()
    }
}

/// The unpacked source, with some patches in it.
struct Tree {
    folder: PathBuf,
}

impl Tree {
    /// The one of this version in the cache, unpacked if it is not there.
    fn of(cache: &Path, recipe: &Recipe) -> Result<Self> {
        let folder = cache.join(format!("source-{}", recipe.version));
        if !folder.join("Makefile").is_file() {
            let archive = format!("/usr/src/linux-source-{SERIES}.tar.xz");
            ensure!(Path::new(&archive).is_file(), "there is no {archive}: reinstall linux-source-{SERIES}");
            let part = cache.join("source.part");
            let _ = fs::remove_dir_all(&part);
            fs::create_dir_all(&part)?;
            let mut tar = Command::new("tar");
            tar.args(["--extract", "--strip-components=1", "--file", &archive, "--directory"]).arg(&part);
            quietly(&mut tar, "the kernel's source cannot be unpacked")?;
            fs::rename(&part, &folder)?;
        }
        Ok(Self { folder })
    }

    fn output(&self) -> PathBuf {
        self.folder.join("out")
    }

    fn applied(&self) -> PathBuf {
        self.folder.join(".lab-patches")
    }

    /// Takes out the patches that are in, and puts these in. Only files that differ are compiled again then.
    fn take_patches(&self, recipe: &Recipe) -> Result<()> {
        let applied = self.applied();
        let key_file = applied.join("key");
        if fs::read_to_string(&key_file).is_ok_and(|key| key == recipe.patches_key()) {
            return Ok(());
        }
        if applied.is_dir() {
            let mut old: Vec<_> = fs::read_dir(&applied)?.flatten().map(|entry| entry.path()).collect();
            old.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
            old.sort();
            for patch in old.iter().rev() {
                if let Err(e) = self.git_apply(patch, &["--reverse"]) {
                    // Somebody else's work, or half done: from the beginning then.
                    fs::remove_dir_all(&self.folder)?;
                    return Err(e.context("the kernel's source was not as it was left; it is gone, try again"));
                }
            }
            fs::remove_dir_all(&applied)?;
        }
        fs::create_dir_all(&applied)?;
        for (name, content) in &recipe.patches {
            let path = applied.join(name);
            fs::write(&path, content)?;
            if let Err(e) = self.git_apply(&path, &[]) {
                fs::remove_file(&path)?;
                let text = format!("host-kernel/patches/{SERIES}/{name} does not apply to Linux {}", recipe.version);
                return Err(e.context(text));
            }
        }
        fs::write(key_file, recipe.patches_key())?;
        Ok(())
    }

    fn git_apply(&self, patch: &Path, more: &[&str]) -> Result<()> {
        let mut git = Command::new("git");
        // A repository around the cache would have its own idea of the paths.
        git.env("GIT_CEILING_DIRECTORIES", self.folder.parent().unwrap_or(&self.folder));
        git.current_dir(&self.folder).arg("apply").args(more).arg("--whitespace=nowarn").arg(patch);
        quietly(&mut git, "git apply failed")
    }

    fn configure(&self, recipe: &Recipe) -> Result<()> {
        fs::create_dir_all(self.output())?;
        self.make(&["tinyconfig"], "no configuration")?;
        let path = self.output().join(".config");
        let tiny = fs::read_to_string(&path)?;
        // What comes last counts.
        fs::write(&path, format!("{tiny}\n{}", recipe.config))?;
        self.make(&["olddefconfig"], "no configuration")?;
        let made = fs::read_to_string(&path)?;
        let lost: Vec<_> = not_in(&recipe.config, &made)
            .filter(|line| recipe.flavour == Flavour::Patched || !line.starts_with(OWN_OPTION))
            .collect();
        ensure!(lost.is_empty(), "Linux {} has not taken from host-kernel/config: {}", recipe.version, lost.join(", "));
        Ok(())
    }

    fn make(&self, targets: &[&str], failed: &str) -> Result<()> {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut make = Command::new("make");
        make.current_dir(&self.folder).arg("O=out").arg(format!("-j{cpus}")).args(targets);
        // The same source gives the same kernel.
        make.envs([
            ("KBUILD_BUILD_TIMESTAMP", "2000-01-01"),
            ("KBUILD_BUILD_USER", "lab"),
            ("KBUILD_BUILD_HOST", "lab"),
        ]);
        let log = self.folder.join("build.log");
        let mut file = File::create(&log)?;
        make.stdout(Stdio::piped()).stderr(file.try_clone()?).stdin(Stdio::null());
        let mut child = make.spawn().context("make cannot be started")?;
        let output = child.stdout.take().context("make has no output")?;
        let (mut lines, started, mut said) = (0_u32, Instant::now(), Instant::now());
        for line in BufReader::new(output).split(b'\n') {
            file.write_all(&line?)?;
            file.write_all(b"\n")?;
            lines += 1;
            if said.elapsed() > SAY_EVERY {
                eprintln!("  {lines} steps in {:.1} min", started.elapsed().as_secs_f64() / 60.0);
                said = Instant::now();
            }
        }
        if !child.wait()?.success() {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let end: Vec<_> = text.lines().rev().take(20).collect();
            let end: Vec<_> = end.into_iter().rev().collect();
            bail!("{failed}; the end of {}:\n{}", log.display(), end.join("\n"));
        }
        Ok(())
    }
}

/// The settings of a fragment that a configuration has not.
fn not_in<'a>(fragment: &'a str, made: &'a str) -> impl Iterator<Item = &'a str> {
    let wanted = fragment.lines().map(str::trim).filter(|line| line.starts_with("CONFIG_"));
    wanted.filter(move |line| match line.strip_suffix("=n") {
        Some(name) => made.lines().any(|made| made.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))),
        None => !made.lines().any(|made| made == *line),
    })
}

/// Runs a command that says nothing unless it fails.
fn quietly(command: &mut Command, failed: &str) -> Result<()> {
    let output = command.output().with_context(|| format!("`{}` cannot be started", shown(command)))?;
    if !output.status.success() {
        bail!("{failed}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_were_not_taken_are_found() {
        let made = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=12\nCONFIG_AB=y\n";
        let lost = |fragment| not_in(fragment, made).collect::<Vec<_>>();
        assert!(lost("# a comment\nCONFIG_A=y\nCONFIG_B=n\n\nCONFIG_C=12").is_empty());
        assert_eq!(lost("CONFIG_B=y\nCONFIG_C=13\nCONFIG_A=n"), ["CONFIG_B=y", "CONFIG_C=13", "CONFIG_A=n"]);
    }

    #[test]
    fn other_patches_are_another_kernel() {
        let recipe = |patch: &str, config: &str| Recipe {
            flavour: Flavour::Patched,
            version: "6.12".into(),
            patches: vec![("0001.patch".into(), patch.into())],
            config: config.into(),
        };
        let key = recipe("a", "x").key();
        assert_eq!(key, recipe("a", "x").key());
        assert_ne!(key, recipe("b", "x").key());
        assert_ne!(key, recipe("a", "y").key());
        assert_ne!(key, Recipe { patches: vec![], flavour: Flavour::Stock, ..recipe("a", "x") }.key());
    }
}
