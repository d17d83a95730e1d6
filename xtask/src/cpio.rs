//! Archives that a kernel unpacks as its first root.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Packs a folder.
///
/// # Errors
/// When there is no cpio, or something in the folder cannot be read.
pub(crate) fn pack(folder: &Path, archive: &Path) -> Result<()> {
    let mut find = Command::new("find").arg(".").current_dir(folder).stdout(Stdio::piped()).spawn()?;
    let names = find.stdout.take().context("find has no output")?;
    let mut cpio = Command::new("cpio");
    cpio.args(["--create", "--format=newc", "--owner=0:0", "--quiet"]).current_dir(folder);
    let packed = cpio.stdin(names).stdout(File::create(archive)?).status();
    let packed = packed.context("there is no cpio: install cpio")?;
    ensure!(packed.success() && find.wait()?.success(), "the initramfs cannot be packed");
    Ok(())
}
