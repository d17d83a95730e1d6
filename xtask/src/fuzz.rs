//! `cargo xtask fuzz`

use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::Args;
use command_line::Output;

use crate::host;
use crate::step::{cargo, program, root, run};

/// Where the targets are: a file each.
const TARGETS: &str = "vmm/fuzz/fuzz_targets";
/// Inputs that together reach what has been reached, a folder a target.
const CORPUS: &str = "vmm/fuzz/corpus";
/// What a run finds besides.
const FOUND: &str = "target/fuzz-corpus";
/// Longest input, in bytes. A device that needs longer ones to misbehave needs them rarely.
const MAX_LENGTH: u32 = 1024;
/// An input that takes longer, in seconds, is a hang.
const HANG: u32 = 10;

/// Options of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// What to fuzz, as the files in `vmm/fuzz/fuzz_targets` are called; everything without this.
    targets: Vec<String>,
    /// How long each runs, in seconds; for ever with 0.
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// How often each runs at most; as often as it can with 0.
    #[arg(long, value_name = "N", default_value_t = 0)]
    runs: u64,
}

/// Runs targets one after the other, each until its time is up or it fails; then its input is in `vmm/fuzz/artifacts`.
pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    if host::is_ci() {
        run(program("rustup").args(["toolchain", "install", "nightly", "--profile", "minimal"]))?;
        run(cargo().args(["install", "cargo-fuzz", "--locked"]))?;
    }
    let has_cargo_fuzz = program("cargo-fuzz").arg("--version").output().is_ok_and(|output| output.status.success());
    ensure!(has_cargo_fuzz, "cargo-fuzz is not here: `cargo install cargo-fuzz`; it takes a nightly toolchain too");
    let all = targets()?;
    let unknown = arguments.targets.iter().find(|target| !all.contains(target));
    ensure!(unknown.is_none(), "there is no target {}: {}", unknown.map_or("", String::as_str), all.join(", "));
    let chosen = if arguments.targets.is_empty() { &all } else { &arguments.targets };
    chosen.iter().try_for_each(|target| fuzz(target, arguments))?;
    Output::default().line(format_args!("No input made {} panic or hang.", chosen.join(", ")))?;
    Ok(())
}

fn targets() -> Result<Vec<String>> {
    let files = std::fs::read_dir(root().join(TARGETS)).with_context(|| format!("{TARGETS} cannot be read"))?;
    let name = |file: std::io::Result<std::fs::DirEntry>| Some(file.ok()?.path().file_stem()?.to_str()?.to_owned());
    let mut names: Vec<_> = files.filter_map(name).collect();
    names.sort_unstable();
    Ok(names)
}

fn fuzz(target: &str, arguments: &Arguments) -> Result<()> {
    let [found, corpus] = [FOUND, CORPUS].map(|folder| Path::new(folder).join(target));
    for folder in [&found, &corpus] {
        std::fs::create_dir_all(root().join(folder)).with_context(|| format!("{} cannot be made", folder.display()))?;
    }
    let mut command = program("rustup");
    // The address sanitizer sees nothing of guest memory, which is mapped past it, and takes half the speed.
    command.args(["run", "nightly", "cargo", "fuzz", "run", "--sanitizer", "none", "--fuzz-dir", "vmm/fuzz", target]);
    command.arg(found).arg(corpus);
    command.arg("--").args([
        format!("-max_total_time={}", arguments.seconds),
        format!("-runs={}", if arguments.runs == 0 { -1 } else { arguments.runs as i64 }),
        format!("-max_len={MAX_LENGTH}"),
        format!("-timeout={HANG}"),
    ]);
    // libFuzzer prints what it finds; its account of how quick it was belongs to that.
    run(command.arg("-print_final_stats=1"))
}
