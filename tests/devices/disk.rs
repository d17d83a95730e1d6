//! A disk is written and found again; what no driver should do does no harm.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use thermocline_tests::{Machine, Sandbox, Trials, trial};
use workload_guest::Line;
use workload_guest::block::{self, BLOCK, Content};
use workload_guest::command::Case;

use crate::answers::disk;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], blocks_are_written_and_found);
    trial!(trials, [Kvm], a_disk_outlives_its_machine);
    trial!(trials, [Kvm], past_the_page_cache_too);
    trial!(trials, [Kvm], discarded_and_zeroed_blocks_become_holes);
    trial!(trials, [Kvm], the_disk_rests_while_the_machine_is_paused);
    trial!(trials, [Kvm], what_no_driver_should_do_does_no_harm);
}

const BYTES: u64 = 8 << 20;
const BLOCKS: u64 = BYTES / BLOCK;

fn image(sandbox: &Sandbox) -> Result<PathBuf> {
    let path = sandbox.path("disk.img");
    File::create(&path)?.set_len(2 * BYTES)?;
    Ok(path)
}

fn boot(sandbox: &Sandbox, path: &Path, guest: &str, more: &str) -> Result<Machine> {
    let option = format!("path={}{more}", path.display());
    sandbox.boot_devices(&[], &format!("disk={BYTES}{guest}"), &["--disk", &option])
}

fn content(file: &File, number: u64) -> Result<Content> {
    let mut bytes = vec![0; BLOCK as usize];
    file.read_exact_at(&mut bytes, number * BLOCK)?;
    let words: Vec<_> = bytes.chunks_exact(8).map(|word| word.try_into().map(u64::from_le_bytes)).collect();
    Ok(block::read(number, 1, |index| words[index].unwrap_or_default()))
}

fn blocks_are_written_and_found() -> Result<()> {
    for guest in ["", ",interrupts=on"] {
        let sandbox = Sandbox::new()?;
        let path = image(&sandbox)?;
        let mut machine = boot(&sandbox, &path, guest, "")?;
        let written = disk(&mut machine, "disk write sequential 65536 4 once")?;
        ensure!(written.bytes == BYTES, "{written:?}");
        disk(&mut machine, "disk-flush")?;
        let file = File::open(&path)?;
        for number in 0..BLOCKS {
            let content = content(&file, number)?;
            ensure!(matches!(content, Content::Generation(1..)), "block {number}: {content:?}");
        }
        let mixed = disk(&mut machine, "disk mixed random 8192 32 500")?;
        ensure!(mixed.requests > 32 && (mixed.interrupts > 0) != guest.is_empty(), "{mixed:?}");
        let read = disk(&mut machine, "disk read sequential 1048576 2 once")?;
        ensure!(read.known == BLOCKS, "{read:?}");
        machine.console.must_run()?;
    }
    Ok(())
}

fn a_disk_outlives_its_machine() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let path = image(&sandbox)?;
    let mut first = boot(&sandbox, &path, "", "")?;
    disk(&mut first, "disk write sequential 65536 4 once")?;
    disk(&mut first, "disk-flush")?;
    first.console.type_line("off")?;
    ensure!(first.process.wait()?.code() == Some(0), "the guest did not power off");
    let mut second = boot(&sandbox, &path, "", "")?;
    // Blocks tell of themselves what they should be.
    let read = disk(&mut second, "disk read sequential 65536 4 once")?;
    ensure!(read.bytes == BYTES && read.known == 0, "{read:?}");
    let file = File::options().write(true).open(&path)?;
    file.write_all_at(&[1], 77 * BLOCK + 2000)?;
    let read = second.console.device("disk read sequential 65536 4 once", crate::answers::disk_done)?;
    ensure!(read.bad == 1, "a damaged block was not found: {read:?}");
    Ok(())
}

fn past_the_page_cache_too() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let path = image(&sandbox)?;
    let mut machine = boot(&sandbox, &path, "", ",direct")?;
    disk(&mut machine, "disk write random 4096 32 300")?;
    let mixed = disk(&mut machine, "disk mixed random 65536 8 300")?;
    ensure!(mixed.requests > 0, "{mixed:?}");
    disk(&mut machine, "disk read sequential 1048576 2 once").map(drop)
}

fn discarded_and_zeroed_blocks_become_holes() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let path = image(&sandbox)?;
    let mut machine = boot(&sandbox, &path, "", "")?;
    disk(&mut machine, "disk write sequential 65536 4 once")?;
    disk(&mut machine, "disk-flush")?;
    let sectors = || -> Result<u64> { Ok(std::fs::metadata(&path)?.blocks()) };
    let before = sectors()?;
    disk(&mut machine, "disk-discard 0 512")?;
    let discarded = sectors()?;
    ensure!(discarded + 512 * 8 <= before, "512 blocks discarded, and {before} sectors became {discarded}");
    disk(&mut machine, "disk-zero 600 100")?;
    let file = File::open(&path)?;
    for number in 600..700 {
        ensure!(content(&file, number)? == Content::Zeros, "block {number} is not zeros");
    }
    let read = disk(&mut machine, "disk read sequential 65536 4 once")?;
    ensure!(read.known == BLOCKS - 512, "{read:?}");
    Ok(())
}

fn the_disk_rests_while_the_machine_is_paused() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let path = image(&sandbox)?;
    let mut machine = boot(&sandbox, &path, ",interrupts=on", "")?;
    machine.console.type_line("disk mixed random 8192 16 forever")?;
    machine.console.must_run()?;
    for _ in 0..5 {
        ensure!(machine.ctl(&["pause"])?.0.code() == Some(0), "pause failed");
        let written = || -> Result<_> { Ok(std::fs::metadata(&path)?.modified()?) };
        let at_rest = written()?;
        std::thread::sleep(std::time::Duration::from_millis(50));
        ensure!(written()? == at_rest, "the disk was written while the machine was paused");
        ensure!(machine.ctl(&["resume"])?.0.code() == Some(0), "resume failed");
        machine.console.must_run()?;
    }
    let done = machine.console.device("disk-stop", crate::answers::disk_done)?;
    ensure!(done.requests > 0 && done.errors == 0 && done.bad == 0, "{done:?}");
    disk(&mut machine, "disk read sequential 65536 4 once").map(drop)
}

fn what_no_driver_should_do_does_no_harm() -> Result<()> {
    const NEEDS_RESET: u32 = 0x40;
    let sandbox = Sandbox::new()?;
    let path = image(&sandbox)?;
    let mut machine = boot(&sandbox, &path, "", "")?;
    disk(&mut machine, "disk write sequential 65536 4 once")?;
    for (name, _) in Case::ALL {
        let hostile = machine
            .console
            .device(&format!("hostile {name}"), |line| if let Line::Hostile(end) = line { Some(end) } else { None })?;
        let is_refused = hostile.status & NEEDS_RESET != 0 || hostile.answered == 1 && hostile.request_status != 0;
        ensure!(is_refused && hostile.works == 1, "{name}: {hostile:?}");
        machine.console.must_run().with_context(|| format!("after {name}"))?;
    }
    let read = disk(&mut machine, "disk read sequential 65536 4 once")?;
    ensure!(read.known == BLOCKS, "something was written: {read:?}");
    machine.status().map(drop)
}
