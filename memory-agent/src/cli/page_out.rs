//! `memory-agent page-out`

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use command_line::{End, Output};
use memory_agent::{
    FilePage, PAGE_SIZE, PageNumber, PageOutError, PageOutOptions, PageOutReport, PageRange, PageRanges, ProcessMemory,
    Target, no_room, page_out_with,
};

use super::exit::{ExitCode, end_of};
use super::idle::Watched;
use super::options::{Memory, duration};
use super::output::size;
use super::stop::Stop;

/// Options of `memory-agent page-out`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    memory: Memory,
    #[command(flatten)]
    what: What,
    /// Have the kernel free what waits in the swap cache of a disk, by `memory.reclaim` of the process's control group: it
    /// takes what it likes of that group, other processes' memory too.
    #[arg(long)]
    reclaim: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Which pages.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct What {
    /// This part of the memory file, as START+LENGTH in bytes, decimal or 0x…, whole pages; may be repeated.
    #[arg(long, value_name = "START+LENGTH", value_parser = range)]
    range: Vec<Range<FilePage>>,
    /// All pages.
    #[arg(long)]
    all: bool,
    /// All pages that nobody touches for so long from now on; needs a kernel with idle page tracking.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    idle: Option<Duration>,
}

/// Pages of a file.
fn range(text: &str) -> Result<Range<FilePage>, String> {
    let number = |text: &str| {
        let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
        parsed.map_err(|e| format!("'{text}': {e}"))
    };
    let (start, length) = text.split_once('+').ok_or("write START+LENGTH, such as 0x200000+1048576")?;
    let (start, length) = (number(start)?, number(length)?);
    let end = start.checked_add(length).ok_or("that is beyond any file")?;
    if start % PAGE_SIZE != 0 || length % PAGE_SIZE != 0 || length == 0 {
        return Err(format!("start and length must be whole pages of {PAGE_SIZE} bytes"));
    }
    Ok(FilePage::range(start / PAGE_SIZE..end / PAGE_SIZE))
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let opened = arguments.memory.open()?;
    let memories = &opened.memories;
    let What { range, all: _, idle } = &arguments.what;
    let chosen = match idle {
        Some(time) => idle_pages(memories, *time)?,
        None if range.is_empty() => {
            memories.iter().map(|memory| PageRanges::from_iter([0..memory.mapping().pages()])).collect()
        }
        None => by_memory(memories, range)?,
    };
    let report = page_out_all(memories, &chosen, arguments.reclaim)?;
    let mut output = Output::default();
    if arguments.json {
        output.print_json(&opened.object(&report))
    } else {
        output.print(&sentence(&report, why_left(memories)))
    }?;
    if report.asked > 0 && report.swapped + report.queued == 0 {
        return Err(end_of(PageOutError::Kept(report.asked)));
    }
    Ok(())
}

/// Pages out of each memory what was chosen of it. Memory that the kernel keeps whole does not keep others from it.
fn page_out_all(memories: &[ProcessMemory], chosen: &[PageRanges], reclaim: bool) -> Result<PageOutReport, End> {
    let mut report = PageOutReport::default();
    let mut options = PageOutOptions::default();
    options.reclaim_group = reclaim;
    for (memory, ranges) in memories.iter().zip(chosen) {
        let one = match page_out_with(memory, ranges, options) {
            Ok(one) => one,
            Err(PageOutError::Kept(pages)) => PageOutReport { asked: pages, left: pages, ..PageOutReport::default() },
            // What was paged out before there was no more room is worth being told of.
            Err(e @ (PageOutError::SwapFull(_) | PageOutError::GroupSwapFull(_))) if report.swapped > 0 => {
                super::output::say(e);
                break;
            }
            Err(e) => return Err(end_of(e)),
        };
        report = report.merge(one);
    }
    Ok(report)
}

/// Which pages of each memory the pages of the file are that they are all of.
fn by_memory(memories: &[ProcessMemory], ranges: &[Range<FilePage>]) -> Result<Vec<PageRanges>, End> {
    if memories.windows(2).any(|two| !Arc::ptr_eq(&two[0].file(), &two[1].file())) {
        let names: Vec<_> = memories.iter().map(ProcessMemory::name).collect();
        let text = format!("a range is of one memory file and there are several, {}: use --name", names.join(" and "));
        return Err(End::text(ExitCode::Usage, text));
    }
    let offsets: Vec<_> = memories.iter().map(pages_in_file).collect();
    for range in ranges {
        let there: u64 = offsets.iter().map(|offsets| range.intersection(offsets).page_count()).sum();
        if there < range.page_count() {
            let has: Vec<_> = offsets.iter().map(bytes).collect();
            let text = format!("the process has {} of the file, not all of {}", has.join(" and "), bytes(range));
            return Err(End::text(ExitCode::Usage, text));
        }
    }
    let of_memory = |(memory, offsets): (&ProcessMemory, &Range<FilePage>)| {
        ranges.iter().map(|range| memory.mapping().of_file(&range.intersection(offsets))).collect()
    };
    Ok(memories.iter().zip(&offsets).map(of_memory).collect())
}

/// The pages of the file that a memory is.
pub(super) fn pages_in_file(memory: &ProcessMemory) -> Range<FilePage> {
    memory.mapping().all_in_file()
}

fn bytes(pages: &Range<FilePage>) -> String {
    format!("{:#x}+{:#x}", pages.start.number() * PAGE_SIZE, pages.byte_count())
}

fn idle_pages(memories: &[ProcessMemory], time: Duration) -> Result<Vec<PageRanges>, End> {
    let stop = Stop::on_signals()?;
    let watched: Vec<_> = memories.iter().map(Watched::begin).collect::<Result<_, _>>().map_err(end_of)?;
    if stop.wait(time) {
        return Err(End::text(ExitCode::Interrupted, "interrupted; nothing was paged out"));
    }
    let idle = watched.into_iter().zip(memories).map(|(watched, memory)| watched.idle(memory));
    idle.collect::<Result<_, _>>().map_err(end_of)
}

/// Why pages stay that are not queued.
fn why_left(memories: &[ProcessMemory]) -> &'static str {
    let full = memories.iter().any(|memory| no_room(memory.pid()).is_ok_and(|full| full.is_some()));
    if full { "there is no more room in swap for them" } else { "somebody works with them" }
}

fn sentence(report: &PageOutReport, why_left: &str) -> String {
    let PageOutReport { asked, swapped, left, queued, .. } = *report;
    if asked == 0 {
        return "none of these pages were in memory\n".into();
    }
    let mut text = format!("paged out {swapped} of {asked} pages ({})", size(swapped));
    if queued > 0 {
        text += &format!("; {queued} are queued for their device, which frees them when memory is needed");
    }
    if left > queued {
        text += &format!("; {} stayed, because {why_left}", left - queued);
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_whole_pages() {
        assert_eq!(range("0x2000+4096"), Ok(FilePage(2).run(1)));
        assert_eq!(range("0+0x10000"), Ok(FilePage(0).run(16)));
        for text in ["", "1", "4096", "1+4096", "4096+1", "0+0", "0x+4096", "-4096+4096", "18446744073709547520+8192"] {
            assert!(range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_report_is_a_sentence() {
        let report = PageOutReport { asked: 300, swapped: 256, left: 44, queued: 4, attempts: 2 };
        assert_eq!(
            sentence(&report, "somebody works with them"),
            "paged out 256 of 300 pages (1 MiB); 4 are queued for their device, which frees them when memory is needed; \
             40 stayed, because somebody works with them\n"
        );
        assert_eq!(sentence(&PageOutReport::default(), ""), "none of these pages were in memory\n");
    }
}
