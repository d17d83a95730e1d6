//! Packages as apt knows them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::step::run;

/// What apt knows of a package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    /// Its name.
    pub(crate) package: String,
    /// Its version.
    pub(crate) version: String,
    /// What it needs, as its field says.
    pub(crate) depends: String,
}

/// All versions of these packages, the newest of each first.
///
/// # Errors
/// When there is no apt.
pub(crate) fn known(packages: &[&str]) -> Result<Vec<Known>> {
    if packages.is_empty() {
        // It would show how it is used.
        return Ok(vec![]);
    }
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

/// The newest version of a package.
///
/// # Errors
/// When apt knows none.
pub(crate) fn named(package: &str) -> Result<Known> {
    known(&[package])?.into_iter().next().with_context(|| {
        format!("apt knows no package {package}: `apt-cache search --names-only '^linux-image-6'` lists kernels")
    })
}

/// The names of packages that begin and end with these.
///
/// # Errors
/// When there is no apt.
pub(crate) fn packages_with(prefix: &str, suffix: &str) -> Result<Vec<String>> {
    let listed = Command::new("apt-cache").args(["pkgnames", prefix]).output();
    let listed = text_of(listed.context("apt-cache cannot be started")?).unwrap_or_default();
    Ok(listed.lines().filter(|name| name.ends_with(suffix)).map(str::to_owned).collect())
}

/// The package with this prefix among what another depends on.
pub(crate) fn the_one_needed(depends: &str, prefix: &str) -> Option<String> {
    let names = depends.split([',', '|']).filter_map(|one| one.split_whitespace().next());
    names.into_iter().find(|name| name.starts_with(prefix)).map(str::to_owned)
}

/// Fetches a package, and gives its file to `take`.
///
/// # Errors
/// When it cannot be fetched or taken.
pub(super) fn fetch(package: &Known, kept: &Path, take: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = TempDir::new_in(kept.parent().unwrap_or(kept)).context("no room for a package")?;
    let Known { package: name, version, .. } = package;
    let mut apt = Command::new("apt-get");
    // Root downloads as another user, who cannot write here; apt would warn that it does not.
    apt.args(["--quiet=2", "--option", "APT::Sandbox::User=root", "download"]).arg(format!("{name}={version}"));
    run(apt.current_dir(folder.path())).with_context(|| format!("cannot fetch {name}: is there a network?"))?;
    let files = fs::read_dir(folder.path())?.flatten().map(|entry| entry.path());
    let file = files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    take(&file.with_context(|| format!("apt-get fetched nothing for {name}"))?)
}

/// What a program printed, if it went well and printed something.
pub(super) fn text_of(output: Output) -> Option<String> {
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metapackage_leads_to_a_kernel() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
                    Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nDescription: Linux: for clouds\n\
                    \nPackage: linux-image-cloud-amd64\nVersion: 6.1.176-1\n";
        let known = parse_known(text);
        assert_eq!(known.len(), 2);
        assert_eq!((known[0].version.as_str(), known[1].version.as_str()), ("6.1.192-2", "6.1.176-1"));
        let kernel = the_one_needed(&known[0].depends, "linux-image-6.1.");
        assert_eq!(kernel.as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(the_one_needed(&known[0].depends, "linux-image-6.12."), None);
    }
}
