//! The kernel's unpacked source: patches put in and taken out, configured, compiled.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use command_line::note;

use super::kernel::{Checks, Flavour, Recipe};
use crate::step::shown;

/// The option that the patches bring, which a stock kernel does not know.
const OWN_OPTION: &str = "CONFIG_PTE_MARKER_PAGEOUT";
/// How often to say that the build goes on.
const SAY_EVERY: Duration = Duration::from_secs(30);

/// The unpacked source, with some patches in it.
pub(super) struct Tree {
    folder: PathBuf,
    output: PathBuf,
}

impl Tree {
    /// The one of this version in the cache, unpacked if it is not there.
    pub(super) fn of(cache: &Path, recipe: &Recipe) -> Result<Self> {
        let series = recipe.variant.series;
        // Patches change headers that nearly every object includes: with and without are trees of their own.
        let folder = cache.join(format!("source-{}-{}", recipe.version, recipe.variant.flavour));
        if !folder.join("Makefile").is_file() {
            let archive = format!("/usr/src/linux-source-{series}.tar.xz");
            ensure!(Path::new(&archive).is_file(), "there is no {archive}: reinstall linux-source-{series}");
            let part = cache.join("source.part");
            let _ = fs::remove_dir_all(&part);
            fs::create_dir_all(&part)?;
            let mut tar = Command::new("tar");
            tar.args(["--extract", "--strip-components=1", "--file", &archive, "--directory"]).arg(&part);
            quietly(&mut tar, "the kernel's source cannot be unpacked")?;
            fs::rename(&part, &folder)?;
        }
        // Checks change nearly every object too.
        let output = folder.join(match recipe.variant.checks {
            Checks::None => "out",
            Checks::Vm => "out-vm",
            Checks::Kasan => "out-kasan",
        });
        Ok(Self { folder, output })
    }

    /// Where the compiler's output goes.
    pub(super) fn output(&self) -> &Path {
        &self.output
    }

    fn applied(&self) -> PathBuf {
        self.folder.join(".lab-patches")
    }

    /// Takes out the patches that are in, and puts these in. Only what depends on files that differ is compiled again then.
    pub(super) fn take_patches(&self, recipe: &Recipe) -> Result<()> {
        let applied = self.applied();
        let key_file = applied.join("key");
        if fs::read_to_string(&key_file).is_ok_and(|key| key == recipe.patches_key()) {
            return Ok(());
        }
        let mut before = Vec::new();
        if applied.is_dir() {
            let mut old: Vec<_> = fs::read_dir(&applied)?.flatten().map(|entry| entry.path()).collect();
            old.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
            old.sort();
            for patch in &old {
                before.extend(self.patched_files(&fs::read(patch)?));
            }
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
                let text = format!(
                    "host-kernel/patches/{}/{name} does not apply to Linux {}",
                    recipe.variant.series, recipe.version
                );
                return Err(e.context(text));
            }
        }
        for (path, content, time) in before {
            if fs::read(&path).is_ok_and(|now| now == content) {
                File::options().write(true).open(&path)?.set_modified(time)?;
            }
        }
        fs::write(key_file, recipe.patches_key())?;
        Ok(())
    }

    /// The files that a patch names, what is in them, and when that was written.
    fn patched_files(&self, patch: &[u8]) -> Vec<(PathBuf, Vec<u8>, SystemTime)> {
        let patch = String::from_utf8_lossy(patch);
        let names = patch.lines().filter_map(|line| line.strip_prefix("+++ b/"));
        let file = |name: &str| {
            let path = self.folder.join(name);
            let time = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
            Some((path.clone(), fs::read(path).ok()?, time))
        };
        names.filter_map(file).collect()
    }

    fn git_apply(&self, patch: &Path, more: &[&str]) -> Result<()> {
        let mut git = Command::new("git");
        // A repository around the cache would have its own idea of the paths.
        git.env("GIT_CEILING_DIRECTORIES", self.folder.parent().unwrap_or(&self.folder));
        git.current_dir(&self.folder).arg("apply").args(more).arg("--whitespace=nowarn").arg(patch);
        quietly(&mut git, "git apply failed")
    }

    pub(super) fn configure(&self, recipe: &Recipe) -> Result<()> {
        fs::create_dir_all(self.output())?;
        self.make(&["tinyconfig"], "no configuration")?;
        let path = self.output().join(".config");
        let tiny = fs::read_to_string(&path)?;
        // What comes last counts.
        fs::write(&path, format!("{tiny}\n{}", recipe.config))?;
        self.make(&["olddefconfig"], "no configuration")?;
        let made = fs::read_to_string(&path)?;
        let lost: Vec<_> = not_in(&recipe.config, &made)
            .filter(|line| recipe.variant.flavour == Flavour::Patched || !line.starts_with(OWN_OPTION))
            .collect();
        ensure!(
            lost.is_empty(),
            "Linux {} has not taken from host-kernel/configs: {}",
            recipe.version,
            lost.join(", ")
        );
        Ok(())
    }

    pub(super) fn make(&self, targets: &[&str], failed: &str) -> Result<()> {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut make = Command::new("make");
        make.current_dir(&self.folder)
            .arg(format!("O={}", self.output.display()))
            .arg(format!("-j{cpus}"))
            .args(targets);
        // The same source gives the same kernel.
        make.envs([
            ("KBUILD_BUILD_TIMESTAMP", "2000-01-01"),
            ("KBUILD_BUILD_USER", "lab"),
            ("KBUILD_BUILD_HOST", "lab"),
        ]);
        let log = self.output.join("build.log");
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
                note(format_args!("  {lines} steps in {:.1} min", started.elapsed().as_secs_f64() / 60.0));
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
    use crate::lab::kernel::{Series, Variant};

    #[test]
    fn patches_go_in_and_out_and_say_when_they_do_not() {
        let folder = tempfile::TempDir::new().unwrap();
        let output = folder.path().join("out");
        let tree = Tree { folder: folder.path().to_owned(), output };
        let (a, b) = (folder.path().join("a.c"), folder.path().join("b.c"));
        fs::write(&a, "one\ntwo\n").unwrap();
        fs::write(&b, "one\n").unwrap();
        let change = |file: &str, from: &str, to: &str| {
            format!("--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-{from}\n+{to}\n").into_bytes()
        };
        let recipe = |patches: &[Vec<u8>]| Recipe {
            variant: Variant { series: Series::V6_12, flavour: Flavour::Patched, checks: Checks::Vm },
            version: "6.12.1".into(),
            patches: patches.iter().enumerate().map(|(i, patch)| (format!("{i:04}.patch"), patch.clone())).collect(),
            config: String::new(),
        };
        let first = change("b.c", "one", "ONE");
        tree.take_patches(&recipe(std::slice::from_ref(&first))).unwrap();
        assert_eq!(fs::read_to_string(&b).unwrap(), "ONE\n");
        let written = || fs::metadata(&b).unwrap().modified().unwrap();
        let before = written();
        let second = b"--- a/a.c\n+++ b/a.c\n@@ -1,2 +1,2 @@\n-one\n+ONE\n two\n".to_vec();
        tree.take_patches(&recipe(&[first.clone(), second])).unwrap();
        assert_eq!(fs::read_to_string(&a).unwrap(), "ONE\ntwo\n");
        assert_eq!(written(), before, "what is the same again need not be compiled again");

        let other = change("b.c", "three", "four");
        let e = format!("{:#}", tree.take_patches(&recipe(&[first.clone(), other])).unwrap_err());
        assert!(e.contains("host-kernel/patches/6.12/0001.patch does not apply to Linux 6.12.1"), "{e}");
        // The next try starts from what could be put in.
        tree.take_patches(&recipe(&[first])).unwrap();
        assert_eq!(fs::read_to_string(&b).unwrap(), "ONE\n");
        assert_eq!(fs::read_to_string(&a).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn settings_that_were_not_taken_are_found() {
        let made = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=12\nCONFIG_AB=y\n";
        let lost = |fragment| not_in(fragment, made).collect::<Vec<_>>();
        assert!(lost("# a comment\nCONFIG_A=y\nCONFIG_B=n\n\nCONFIG_C=12").is_empty());
        assert_eq!(lost("CONFIG_B=y\nCONFIG_C=13\nCONFIG_A=n"), ["CONFIG_B=y", "CONFIG_C=13", "CONFIG_A=n"]);
    }
}
