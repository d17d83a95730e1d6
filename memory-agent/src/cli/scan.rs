//! `memory-agent scan`

use std::fs::File;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use command_line::{End, Output};
use indicatif::{ProgressBar, ProgressStyle};
use memory_agent::{
    ByteSize, ContentHash, PAGE_SIZE, PageRange, ProcessMemory, Reader, ScanReport, SparseDump, Target, ZeroFinder,
    scan,
};
use serde_json::json;

use super::exit::{ExitCode, end_of};
use super::options::Memory;
use super::output::{say, size};
use super::page_out::pages_in_file;
use super::stop::Stop;

/// Options of `memory-agent scan`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Print the BLAKE3 hash of the content, holes as zeros: what `b3sum` says of a dump.
    Hash(Options),
    /// Print how many pages take memory or swap and hold nothing but zeros.
    Zero(Options),
    /// Copy the content to a file, where holes and zero pages stay holes.
    Dump {
        /// The file; one that is there is replaced when the dump is complete.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Debug, Args)]
struct Options {
    #[command(flatten)]
    memory: Memory,
    /// How much of what is swapped may be resident at a time.
    #[arg(long, value_name = "SIZE", default_value = "16MiB")]
    window: ByteSize,
    /// Print one JSON object for each memory.
    #[arg(long)]
    json: bool,
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let stop = Stop::on_signals()?;
    match &arguments.what {
        What::Hash(options) => hash(options, &stop),
        What::Zero(options) => zero(options, &stop),
        What::Dump { file, options } => dump(file, options, &stop),
    }
}

fn hash(options: &Options, stop: &Stop) -> Result<(), End> {
    let mut output = Output::default();
    let opened = options.memory.open()?;
    for memory in &opened.memories {
        let mut hash = ContentHash::default();
        let report = read(memory, options, &mut hash, stop)?;
        if options.json {
            let object = json!({ "name": memory.name(), "blake3": hash.hex(), "scan": report });
            output.print_json(&opened.object(&object))?;
        } else {
            output.print(&format!("{}  {}\n", hash.hex(), memory.name()))?;
        }
    }
    Ok(())
}

fn zero(options: &Options, stop: &Stop) -> Result<(), End> {
    let mut output = Output::default();
    let opened = options.memory.open()?;
    for memory in &opened.memories {
        let mut zeros = ZeroFinder::default();
        let report = read(memory, options, &mut zeros, stop)?;
        let pages = zeros.pages();
        if options.json {
            let ranges: Vec<_> = zeros.ranges().iter().map(|range| (range.start, range.page_count())).collect();
            let object = json!({
                "name": memory.name(), "pages": pages, "bytes": pages * PAGE_SIZE, "ranges": ranges, "scan": report,
            });
            output.print_json(&opened.object(&object))?;
        } else {
            let of = report.pages.resident + report.pages.swapped;
            output.print(&format!(
                "{pages} of {of} pages hold nothing but zeros ({})  {}\n",
                size(pages),
                memory.name()
            ))?;
        }
    }
    Ok(())
}

fn dump(path: &Path, options: &Options, stop: &Stop) -> Result<(), End> {
    let opened = options.memory.open()?;
    let [memory] = opened.memories.as_slice() else {
        let names: Vec<_> = opened.memories.iter().map(ProcessMemory::name).collect();
        let text = format!("a dump is of one memory and there are several, {}: use --name", names.join(" and "));
        return Err(End::text(ExitCode::Usage, text));
    };
    let failed = |e: std::io::Error| End::text(ExitCode::Failure, format!("cannot write {}: {e}", path.display()));
    // Half a dump must not be taken for a whole one.
    let part = Part::beside(path);
    let file = File::create(&part.0).map_err(failed)?;
    let mut dump = SparseDump::new(file, &pages_in_file(memory)).map_err(failed)?;
    let report = read(memory, options, &mut dump, stop)?;
    part.becomes(path).map_err(failed)?;
    let written = dump.written();
    let mut output = Output::default();
    if options.json {
        let pages = memory.mapping().pages();
        let object = json!({ "name": memory.name(), "pages": pages, "written": written, "scan": report });
        output.print_json(&opened.object(&object))?;
    } else {
        output.print(&format!(
            "{written} of {} pages written ({}), the others are holes  {}\n",
            memory.mapping().pages(),
            size(written),
            path.display()
        ))?;
    }
    Ok(())
}

/// A file that is not complete; removed when it does not become one that is.
pub(super) struct Part(PathBuf);

impl Part {
    /// One in the folder of `path`.
    pub(super) fn beside(path: &Path) -> Self {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        Self(path.with_file_name(name))
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Gives it its name.
    pub(super) fn becomes(self, path: &Path) -> std::io::Result<()> {
        std::fs::rename(&self.0, path)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Fails when it has its name.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Reads a memory, with a bar where somebody watches.
fn read(memory: &ProcessMemory, options: &Options, reader: &mut dyn Reader, stop: &Stop) -> Result<ScanReport, End> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(1) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{bar:32.cyan/blue} {percent:>3}% {msg} {eta} left");
    let bar =
        bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(memory.name().to_owned());
    let report = scan(&memory.file(), pages_in_file(memory), options.window.pages(), reader, &mut |progress| {
        bar.set_length(progress.pages);
        bar.set_position(progress.done);
        if stop.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let report = report.map_err(end_of)?;
    let restored = report.restored;
    if !report.complete {
        let text = format!("interrupted; {} pages that this swapped in are paged out again", restored.swapped);
        return Err(End::text(ExitCode::Interrupted, text));
    }
    if restored.left > restored.queued {
        say(format!("{} pages stay in memory, because their owner works with them", restored.left - restored.queued));
    }
    Ok(report)
}
