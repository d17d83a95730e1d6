//! `cargo xtask lint`

use anyhow::{Result, bail};

use crate::host;
use crate::step::{cargo, program, run};

/// The guest's image: a crate of its own that its package's build script compiles, so that cargo knows nothing of it.
const IMAGE: &str = "guest-images/workload/image/main.rs";

pub(crate) fn main() -> Result<()> {
    let missing = ["rustfmt", "clippy"].into_iter().filter(|component| !has(component)).collect::<Vec<_>>();
    if !missing.is_empty() {
        if host::find_program("rustup").is_none() {
            bail!("this Rust toolchain has no {}: install what it needs to check the code", missing.join(" and no "));
        }
        run(program("rustup").args(["component", "add"]).args(&missing))?;
    }
    let mut steps = [cargo(), program("rustfmt"), cargo(), cargo()];
    steps[0].args(["fmt", "--all", "--check"]);
    steps[1].args(["--check", "--edition", "2024", IMAGE]);
    steps[2].args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    steps[3].args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    // All of them, so that one run tells everything.
    let failed: Vec<String> = steps.iter_mut().filter_map(|step| run(step).err()).map(|e| format!("{e:#}")).collect();
    if !failed.is_empty() {
        bail!(failed.join("\n"));
    }
    println!("Formatting, lints and documentation are clean.");
    Ok(())
}

fn has(component: &str) -> bool {
    let name = if component == "clippy" { "clippy" } else { "fmt" };
    cargo().args([name, "--version"]).output().is_ok_and(|output| output.status.success())
}
