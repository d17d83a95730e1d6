//! `cargo xtask man`

use anyhow::Result;
use command_line::Output;

use crate::step::{cargo, root, run};

/// Where the pages go.
const FOLDER: &str = "target/man";
/// Packages with a program each.
const PROGRAMS: [&str; 2] = ["thermocline", "memory-agent"];

/// Writes the manual pages of both programs and their subcommands.
pub(crate) fn main() -> Result<()> {
    for package in PROGRAMS {
        let folder = root().join(FOLDER);
        run(cargo().args(["run", "--quiet", "--package", package, "--", "man-pages", "--to"]).arg(folder))?;
    }
    Ok(Output::default().line(format_args!("Manual pages are in {FOLDER}: `man -l {FOLDER}/thermocline.1`"))?)
}
