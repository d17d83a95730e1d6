//! Somebody reads all memory of a guest that is mostly swapped out: any program, and `memory-agent scan`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use memory_agent::SwapCounters;

use super::guarded::MemoryAgent;
use crate::subject::{GuestSpec, Host, Subject};
use crate::{sampler, stop};

/// How long the guest works before it is read.
const WORK: Duration = Duration::from_secs(1);

/// Who reads.
pub(super) enum Reader<'a> {
    /// `cat`, by the memory file.
    Cat,
    /// `memory-agent scan hash`.
    Scan(&'a MemoryAgent, u64),
}

impl Reader<'_> {
    fn command(&self, host: &Host) -> Result<Command> {
        Ok(match self {
            Self::Cat => {
                let mut command = Command::new("cat");
                command.arg(memory_file(host)?);
                command
            }
            Self::Scan(agent, window_mib) => {
                let mut command = agent.command("scan", host);
                command.args(["--window", &format!("{window_mib}MiB")]);
                command
            }
        })
    }
}

/// A path by which other programs can read a host's memory.
fn memory_file(host: &Host) -> Result<PathBuf> {
    let folder = format!("/proc/{}/fd", host.process.pid());
    let links = std::fs::read_dir(&folder).with_context(|| folder.clone())?.flatten().map(|entry| entry.path());
    let is_memory = |path: &PathBuf| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains(host.ram_name()))
    };
    links.into_iter().find(is_memory).with_context(|| format!("no memory file in {folder}"))
}

/// Boots, pages out, has all memory read, counts.
pub(super) fn measure(
    subject: &dyn Subject,
    machine: &GuestSpec,
    reader: &Reader<'_>,
    folder: &Path,
) -> Result<BTreeMap<&'static str, f64>> {
    let host = subject.run(folder, machine)?;
    let (_, ready) = host.console.ready()?;
    let ram = host.ram()?;
    ram.page_out(&ready.cold)?;
    stop::sleep(WORK)?;
    let before = ram.counts()?;
    let swap_before = SwapCounters::read()?;
    let pid = host.process.pid();
    let (total, peaks) = sampler::during(&ram, pid, pid, || {
        let start = Instant::now();
        let mut command = reader.command(&host)?;
        let status = command.stdout(Stdio::null()).status().context("the reader cannot be started")?;
        if !status.success() {
            bail!("the reader failed: {status}");
        }
        Ok(start.elapsed())
    })?;
    let swap = SwapCounters::read()?.since(&swap_before);
    let after = ram.counts()?;
    let all = host.console.check()?;
    ensure!(all.errors == 0, "{} pages are not what the guest wrote", all.errors);
    Ok(BTreeMap::from([
        ("total_ms", total.as_secs_f64() * 1000.0),
        ("swap_ins", swap.swap_ins as f64),
        ("swap_outs", swap.swap_outs as f64),
        ("source_resident_before", before.resident as f64),
        ("source_resident_peak", peaks.source_resident.max(before.resident) as f64),
        ("source_resident_after", after.resident as f64),
        ("errors", all.errors as f64),
    ]))
}
