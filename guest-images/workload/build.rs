//! Builds the guest image with the compiler that builds this crate: a freestanding program for the host's own target,
//! so that no other target, tool or network is needed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(workload_image)");
    let root = variable("CARGO_MANIFEST_DIR");
    let image = variable("OUT_DIR").join("workload.elf");
    for folder in ["image", "src"] {
        rerun_for_files_in(&root.join(folder));
    }
    println!("cargo::rerun-if-changed=build.rs");

    // `RUSTC` and not a wrapper: under `cargo clippy` the wrapper would lint and write nothing.
    let status = Command::new(variable("RUSTC"))
        .arg(root.join("image/main.rs"))
        .args(["--crate-name", "workload_image", "--crate-type", "bin", "--edition", "2024"])
        .args(["--target", "x86_64-unknown-linux-gnu", "--cfg", "workload_image", "-D", "warnings"])
        .args(["-C", "panic=abort", "-C", "opt-level=2", "-C", "codegen-units=1", "-C", "strip=symbols"])
        // Plain SSE2: hypervisors do not agree on what else ring 3 may use.
        .args(["-C", "target-cpu=x86-64", "-C", "relocation-model=static", "-C", "code-model=small"])
        .args(["-C", "linker=cc", "-C", "link-arg=-nostdlib", "-C", "link-arg=-nostartfiles"])
        .args(["-C", "link-arg=-static", "-C", "link-arg=-no-pie", "-C", "link-arg=-Wl,--build-id=none"])
        .args(["-C", "link-arg=-Wl,-z,max-page-size=4096"])
        .arg("-C")
        .arg(format!("link-arg=-Wl,-T,{}", root.join("image/link.ld").display()))
        .arg("-o")
        .arg(&image)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("the guest image did not compile: rustc ended with {status}"),
        Err(error) => panic!("the guest image needs rustc to run: {error}"),
    }
}

fn variable(name: &str) -> PathBuf {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}")).into()
}

/// A folder's own date does not change with its files', so each is named.
fn rerun_for_files_in(folder: &Path) {
    println!("cargo::rerun-if-changed={}", folder.display());
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            rerun_for_files_in(&path);
        } else {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
}
