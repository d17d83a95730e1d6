//! `memory-agent map`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use command_line::{End, print, print_json};
use memory_agent::{KernelOffer, PageRange, ProbeChoice, picture};

use super::exit::ExitCode;
use super::map_file::{MapFile, MemoryMap};
use super::options::Memory;
use super::output::size;

/// Options of `memory-agent map`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    memory: Memory,
    /// How to ask: `page-cache` is exact on any kernel; `marker` is quick on marker-patched kernels; `uffd-marker` works
    /// on a process's own memory only, so never here.
    #[arg(long, value_name = "PROBE", default_value_t = ProbeChoice::Auto)]
    probe: ProbeChoice,
    /// Write a drawing of the largest memory to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// List the runs of pages in one state, too.
    #[arg(long)]
    runs: bool,
    /// Print one JSON object, with all runs: what `guard --like` reads.
    #[arg(long)]
    json: bool,
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let file = MapFile::of(&arguments.memory.open()?, arguments.probe)?;
    if let Some(path) = &arguments.svg
        && let Some(largest) = file.memories.iter().max_by_key(|memory| memory.pages)
    {
        let title = format!("{} of process {}", largest.name, file.pid);
        let written = std::fs::write(path, picture::svg(&title, &largest.runs));
        written.map_err(|e| End::text(ExitCode::Failure, format!("cannot write {}: {e}", path.display())))?;
    }
    if arguments.json {
        return Ok(print_json(&file)?);
    }
    let mut text = String::new();
    for memory in &file.memories {
        text += &heading(memory);
        text += &picture::draw(&picture::cells(&memory.runs, picture::CELLS));
        text += &format!("{}\n{}", picture::LEGEND, counts(memory));
        if arguments.runs {
            text += &runs(memory);
        }
        text.push('\n');
    }
    Ok(print(&(text + &how(&file, arguments.probe)))?)
}

pub(super) fn heading(memory: &MemoryMap) -> String {
    let part = if memory.file_offset == 0 { String::new() } else { format!(", from {:#x} on", memory.file_offset) };
    format!("{}{part}: {} at {:#x}\n", memory.name, size(memory.pages), memory.address)
}

fn counts(memory: &MemoryMap) -> String {
    let counts =
        [("resident", memory.counts.resident), ("swapped", memory.counts.swapped), ("hole", memory.counts.hole)];
    // As `thermocline pages` has them.
    counts.map(|(name, count)| format!("{name:>9} {count:>10} pages  {}\n", size(count))).concat()
}

fn runs(memory: &MemoryMap) -> String {
    let mut text = String::from("\n     first page       pages  state\n");
    for run in memory.runs.runs() {
        let state = format!("{:?}", run.state).to_lowercase();
        // Writing to a String does not fail.
        let _ = writeln!(text, "{:>15} {:>11}  {state}", run.pages.start, run.pages.page_count());
    }
    text
}

/// Which probe answered, how certain that is, and what it cost.
fn how(file: &MapFile, choice: ProbeChoice) -> String {
    let pages: u64 = file.memories.iter().map(|memory| memory.pages).sum();
    let ns: f64 = file.memories.iter().map(|memory| memory.ns_per_page * memory.pages as f64).sum();
    let certain = if file.exact { "exact" } else { "holes are certain, which pages are in memory is in part belief" };
    let why = match choice {
        ProbeChoice::Auto => KernelOffer::of_this_host().best().1,
        ProbeChoice::Only(_) => certain,
    };
    format!("probe {} ({why}), {:.0} ns a page\n", file.probe, ns / pages.max(1) as f64)
}
