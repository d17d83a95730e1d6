//! `cargo xtask lint`

use std::process::Command;

use anyhow::{Result, bail};
use command_line::{Output, note};

use crate::step::{cargo, program, root, run};
use crate::{apt, error_causes, host};

/// The guest's image: a crate of its own that its package's build script compiles, so that cargo knows nothing of it.
const IMAGE: &str = "guest-images/workload/image/main.rs";
/// The oldest compiler that is promised to do: the workspace's `rust-version`, which this package has too.
const OLDEST: &str = env!("CARGO_PKG_RUST_VERSION");
/// What checks the dependencies. Newer ones may need a newer compiler.
const CARGO_DENY: &str = "0.20.2";

/// What CI's machines read.
const WORKFLOWS: &str = ".github/workflows";
/// What checks the workflows: it brings their schema along.
const CHECK_JSONSCHEMA: &str = "0.39.0";

pub(crate) fn main() -> Result<()> {
    let missing = ["rustfmt", "clippy"].into_iter().filter(|component| !has(component)).collect::<Vec<_>>();
    if !missing.is_empty() {
        if host::find_program("rustup").is_none() {
            bail!("this Rust toolchain has no {}: install what it needs to check the code", missing.join(" and no "));
        }
        run(program("rustup").args(["component", "add"]).args(&missing))?;
    }
    let mut steps = vec![cargo(), program("rustfmt"), cargo(), cargo()];
    steps[0].args(["fmt", "--all", "--check"]);
    steps[1].args(["--check", "--edition", "2024", IMAGE]);
    steps[2].args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    steps[3].args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    steps.extend(oldest_compiler()?);
    steps.extend(dependencies()?);
    steps.extend(workflows()?);
    // All of them, so that one run tells everything.
    let mut failed: Vec<String> =
        steps.iter_mut().filter_map(|step| run(step).err()).map(|e| format!("{e:#}")).collect();
    failed.extend(error_causes::said_twice(&root())?);
    if !failed.is_empty() {
        bail!(failed.join("\n"));
    }
    Output::default().line(format_args!("Formatting, lints, documentation and dependencies are clean."))?;
    Ok(())
}

fn has(component: &str) -> bool {
    let name = if component == "clippy" { "clippy" } else { "fmt" };
    cargo().args([name, "--version"]).output().is_ok_and(|output| output.status.success())
}

/// Checks everything with the oldest compiler, unless that is the one that does so anyway.
///
/// # Errors
/// In CI, when there is none.
fn oldest_compiler() -> Result<Option<Command>> {
    let version = program("rustc").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    if is_version(&String::from_utf8_lossy(&version), OLDEST) {
        return Ok(None);
    }
    let toolchain = format!("{OLDEST}.0");
    let rustup = |words: &[&str]| {
        let mut rustup = program("rustup");
        rustup.args(words);
        rustup
    };
    let is_there = || rustup(&["run", &toolchain, "rustc", "--version"]).output().is_ok_and(|o| o.status.success());
    if !is_there() && host::is_ci() {
        let _ = run(&mut rustup(&["toolchain", "install", &toolchain, "--profile", "minimal"]));
    }
    if !is_there() {
        let text = format!(
            "Rust {OLDEST}, the oldest that Cargo.toml promises, is not here: `rustup toolchain install {toolchain}`"
        );
        if host::is_ci() {
            bail!(text);
        }
        note(format_args!("{text}; whether it will do is not checked."));
        return Ok(None);
    }
    let mut check = rustup(&["run", &toolchain, "cargo", "check", "--workspace", "--all-targets"]);
    // Its own, and this one's would be compiled again; and this process's cargo has told its children who it is.
    check
        .args(["--target-dir", "target/oldest"])
        .env_remove("CARGO")
        .env_remove("RUSTC")
        .env_remove("RUSTUP_TOOLCHAIN");
    Ok(Some(check))
}

/// Whether `rustc --version` says that it is this one, whose last number may be left out.
fn is_version(said: &str, version: &str) -> bool {
    let number = said.split_whitespace().nth(1).unwrap_or_default();
    number == version || number.strip_prefix(version).is_some_and(|rest| rest.starts_with('.'))
}

/// Checks licences, sources, and what may be there only once, by `deny.toml`.
///
/// # Errors
/// In CI, when cargo-deny cannot be installed.
fn dependencies() -> Result<Option<Command>> {
    let folder = root().join(format!("target/tools/cargo-deny-{CARGO_DENY}"));
    let deny = folder.join("bin/cargo-deny");
    if !deny.is_file() {
        // In this folder and not among the user's programs; quickly built, for it has little to do.
        let mut install = cargo();
        install.args(["install", "--locked", "--debug", "--quiet", "cargo-deny", "--version", CARGO_DENY, "--root"]);
        install.arg(&folder);
        if let Err(e) = run(&mut install) {
            if host::is_ci() {
                return Err(e);
            }
            note(format_args!("{e:#}; dependencies are not checked."));
            return Ok(None);
        }
    }
    let mut check = program(deny);
    check.args(["check", "bans", "licenses", "sources"]);
    Ok(Some(check))
}

/// Checks what CI's machines read, which cannot be run here, by its schema.
///
/// # Errors
/// In CI, when the checker cannot be installed.
fn workflows() -> Result<Option<Command>> {
    let folder = root().join(format!("target/tools/check-jsonschema-{CHECK_JSONSCHEMA}"));
    let check = folder.join("bin/check-jsonschema");
    if !check.is_file() {
        let install = || {
            let make = || run(program("python3").args(["-m", "venv"]).arg(&folder));
            if make().is_err() && host::is_root() {
                // Debian's Python leaves that out.
                apt::install(&["python3-venv"])?;
                make()?;
            }
            let package = format!("check-jsonschema=={CHECK_JSONSCHEMA}");
            run(program(folder.join("bin/pip")).args(["install", "--quiet", "--disable-pip-version-check", &package]))
        };
        if let Err(e) = install() {
            if host::is_ci() {
                return Err(e);
            }
            note(format_args!("{e:#}; the workflows are not checked."));
            return Ok(None);
        }
    }
    let files = std::fs::read_dir(root().join(WORKFLOWS))?.flatten().map(|entry| entry.path());
    let mut command = program(check);
    command.args(["--builtin-schema", "vendor.github-workflows"]).args(files);
    Ok(Some(command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        assert!(is_version("rustc 1.95.0 (59807616e 2026-04-14)", "1.95"));
        assert!(is_version("rustc 1.95.0 (59807616e 2026-04-14)", "1.95.0"));
        assert!(!is_version("rustc 1.95.0 (59807616e 2026-04-14)", "1.9"));
        assert!(!is_version("rustc 1.96.0-nightly (abc 2026-04-14)", "1.95"));
        assert!(!is_version("", "1.95"));
    }
}
