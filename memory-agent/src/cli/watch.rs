//! `memory-agent watch`

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use command_line::{End, print, print_json};
use memory_agent::{ChosenProbe, Counts, ProbeChoice, ProcessMemory, picture};
use rustix::termios::tcgetwinsize;
use serde::Serialize;

use super::exit::{ExitCode, end_of};
use super::map::heading;
use super::map_file::MemoryMap;
use super::options::{Memory, duration};
use super::output::{say, size};
use super::stop::Stop;

/// Options of `memory-agent watch`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    memory: Memory,
    /// How to ask: see `map --help`.
    #[arg(long, value_name = "PROBE", default_value_t = ProbeChoice::Auto)]
    probe: ProbeChoice,
    /// How often to look.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    interval: Duration,
    /// Print one JSON object a look.
    #[arg(long)]
    json: bool,
}

/// One look.
#[derive(Serialize)]
struct Look {
    /// Since the first one, seconds.
    seconds: f64,
    /// Of all memories.
    counts: Counts,
    change: Change,
}

/// Pages more or fewer than at the last look.
#[derive(Serialize)]
struct Change {
    hole: i64,
    resident: i64,
    swapped: i64,
}

impl Change {
    fn between(before: Counts, now: Counts) -> Self {
        let change = |before: u64, now: u64| now.cast_signed() - before.cast_signed();
        Self {
            hole: change(before.hole, now.hole),
            resident: change(before.resident, now.resident),
            swapped: change(before.swapped, now.swapped),
        }
    }
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let stop = Stop::on_signals()?;
    let opened = arguments.memory.open()?;
    let memories = &opened.memories;
    let probes = memories.iter().map(|memory| ChosenProbe::new(arguments.probe, memory));
    let probes: Vec<_> = probes.collect::<Result<_, _>>().map_err(end_of)?;
    let mut screen = (!arguments.json && std::io::stdout().is_terminal()).then(Screen::default);
    let started = Instant::now();
    let mut before = None;
    loop {
        let looked = Instant::now();
        let maps = match look(memories, &probes) {
            Err(end) if before.is_some() && end.code() == u8::from(ExitCode::Gone) => {
                say(end);
                return Ok(());
            }
            maps => maps?,
        };
        let counts = maps.iter().fold(Counts::default(), |sum, map| sum + map.counts);
        let change = Change::between(before.unwrap_or(counts), counts);
        let look = Look { seconds: started.elapsed().as_secs_f64(), counts, change };
        before = Some(counts);
        match &mut screen {
            _ if arguments.json => print_json(&opened.object(&look))?,
            Some(screen) => screen.show(&maps, &look)?,
            None => print(&line(&look))?,
        }
        if stop.wait(arguments.interval.saturating_sub(looked.elapsed())) {
            return Ok(());
        }
    }
}

fn look(memories: &[ProcessMemory], probes: &[ChosenProbe]) -> Result<Vec<MemoryMap>, End> {
    memories.iter().zip(probes).map(|(memory, probe)| MemoryMap::of(memory, probe)).collect()
}

fn line(look: &Look) -> String {
    let Look { seconds, counts, change } = look;
    format!(
        "{seconds:>8.1} s  resident {} ({:+})  swapped {} ({:+})  hole {} ({:+}) pages\n",
        counts.resident, change.resident, counts.swapped, change.swapped, counts.hole, change.hole
    )
}

/// A terminal where each look takes the place of the last one.
#[derive(Default)]
struct Screen {
    /// Lines of the last look.
    lines: usize,
}

impl Screen {
    fn show(&mut self, maps: &[MemoryMap], look: &Look) -> Result<(), End> {
        let rows = tcgetwinsize(std::io::stdout()).map_or(0, |size| usize::from(size.ws_row));
        let mut text = String::new();
        for map in maps {
            let picture = heading(map) + &picture::draw(&picture::cells(&map.runs, picture::CELLS));
            // What has scrolled away cannot be drawn over: pictures that do not fit are left out.
            if rows > 0 && (text.clone() + &picture).lines().count() + 6 > rows {
                break;
            }
            text += &picture;
        }
        text += &format!("{}\n", picture::LEGEND);
        let Look { seconds, counts, change } = look;
        for (name, count, change) in [
            ("resident", counts.resident, change.resident),
            ("swapped", counts.swapped, change.swapped),
            ("hole", counts.hole, change.hole),
        ] {
            text += &format!("{name:>9} {count:>10} pages  {:<12} {change:>+9}\n", size(count).to_string());
        }
        text += &format!("{seconds:>9.0} s; Ctrl-C ends this\n");
        // Up to where the last look began, and everything below is erased.
        let back = if self.lines > 0 { format!("\x1b[{}A\x1b[J", self.lines) } else { String::new() };
        self.lines = text.lines().count();
        Ok(print(&(back + &text))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_has_changed() {
        let before = Counts { hole: 10, resident: 20, swapped: 5 };
        let counts = Counts { hole: 10, resident: 18, swapped: 7 };
        let look = Look { seconds: 2.0, counts, change: Change::between(before, counts) };
        assert_eq!(line(&look), "     2.0 s  resident 18 (-2)  swapped 7 (+2)  hole 10 (+0) pages\n");
    }
}
