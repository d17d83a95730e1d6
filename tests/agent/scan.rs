//! Reading all memory, and leaving it as it was.

use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use memory_agent::{ContentHash, FilePage, PAGE_SIZE, PageNumber, Reader, is_zero};
use rustix::process::Signal;
use serde_json::Value;
use thermocline_tests::agent::{ColdGuest, fails, prints, sentence, start};
use thermocline_tests::console::eventually;
use thermocline_tests::swap::undisturbed;
use thermocline_tests::{Sandbox, Trials, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Zram], scans_read_what_is_there_and_leave_it_as_it_was);
    trial!(trials, [Kvm, Root, Zram], an_interrupted_scan_leaves_memory_as_it_was);
    trial!(trials, [Kvm, Root, Zram], a_dump_that_fails_leaves_no_file);
}

fn scans_read_what_is_there_and_leave_it_as_it_was() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let hash = prints(&["scan", "hash"], guest.pid(), &["--window", "4MiB"])?;
        guest.must_be_as_before().context("after hash")?;

        let dump = sandbox.path("dump");
        let told = prints(&["scan", "dump", dump.to_str().context("a path")?], guest.pid(), &["--json"])?;
        guest.must_be_as_before().context("after dump")?;
        let told: Value = serde_json::from_str(&told.concat())?;

        let zero = prints(&["scan", "zero"], guest.pid(), &["--json"])?;
        guest.must_be_as_before().context("after zero")?;
        let zero: Value = serde_json::from_str(&zero.concat())?;

        let content = std::fs::read(&dump)?;
        let pages = content.len() as u64 / PAGE_SIZE;
        let mut expected = ContentHash::default();
        expected.content(FilePage(0).run(pages), &content)?;
        let line = format!("{}  /memfd:thermocline-guest-ram", expected.hex());
        ensure!(hash == [line], "{hash:?}, and the dump's is {}", expected.hex());
        // Sparse: no more than what is not zero, and not less.
        let written = content.chunks(PAGE_SIZE as usize).filter(|page| !is_zero(page)).count() as u64;
        let occupied = std::fs::metadata(&dump)?.blocks() * 512 / PAGE_SIZE;
        ensure!(told["written"] == written, "{} pages written of {written}", told["written"]);
        ensure!(occupied <= written + 64, "{occupied} pages occupied of {written}");
        let zeros = guest.before.resident + guest.before.swapped - written;
        ensure!(zero["pages"] == zeros, "{} pages of zeros, not {zeros}", zero["pages"]);

        // Last, because it swaps all in.
        ensure!(content == guest.read()?, "the dump is not what the memory holds");
        ensure!(guest.counts()?.swapped < 64, "reading swaps nothing in: these trials prove nothing");
        Ok(())
    })
}

fn an_interrupted_scan_leaves_memory_as_it_was() -> Result<()> {
    for signal in [Signal::INT, Signal::TERM] {
        undisturbed(|| {
            let sandbox = Sandbox::new()?;
            let guest = ColdGuest::new(&sandbox)?;
            let scan = start(&["scan", "hash"], guest.pid(), &[])?;
            eventually("it swaps pages in", || Ok(guest.counts()?.resident > guest.before.resident + 64))?;
            scan.signal(signal)?;
            let said = sentence(&scan.wait()?, 130)?;
            ensure!(said.starts_with("interrupted"), "{said}");
            ensure!(scan.stdout.is_empty(), "half a hash: {:?}", scan.stdout.lines());
            guest.must_be_as_before()
        })?;
    }
    Ok(())
}

fn a_dump_that_fails_leaves_no_file() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let dump = sandbox.path("dump");
        let path = dump.to_str().context("a path")?;
        let scan = start(&["scan", "dump", path], guest.pid(), &[])?;
        eventually("it swaps pages in", || Ok(guest.counts()?.resident > guest.before.resident + 64))?;
        scan.signal(Signal::INT)?;
        sentence(&scan.wait()?, 130)?;
        let folder = dump.parent().context("a folder")?;
        let left: Vec<_> = std::fs::read_dir(folder)?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(!left.iter().any(|name| name.to_string_lossy().contains("dump")), "{left:?}");
        let said = fails(1, &["scan", "dump", "/proc/nowhere/dump"], guest.pid(), &[])?;
        ensure!(said.contains("/proc/nowhere/dump"), "{said}");
        guest.must_be_as_before()
    })
}
