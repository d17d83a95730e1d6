//! The map of a process's memory as a file: what `map --json` prints and `guard --like` reads.

use std::path::Path;
use std::time::Instant;

use command_line::End;
use memory_agent::{ChosenProbe, Counts, ProbeChoice, ProcessMemory, Residency, Target};
use serde::{Deserialize, Serialize};

use super::exit::{ExitCode, end_of};
use super::opened::{Omission, Opened};

/// All memories of a process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MapFile {
    /// The process it was.
    pub(crate) pid: u32,
    /// The probe's name.
    pub(crate) probe: String,
    /// Whether all of it is certain; else holes are.
    pub(crate) exact: bool,
    /// The largest first.
    pub(crate) memories: Vec<MemoryMap>,
    /// What there is no map of.
    #[serde(default)]
    pub(crate) left_out: Vec<Omission>,
}

/// One memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MemoryMap {
    /// The file's name.
    pub(crate) name: String,
    /// Where the process has it.
    pub(crate) address: u64,
    /// Of its first page in the file, bytes.
    pub(crate) file_offset: u64,
    /// Number of pages.
    pub(crate) pages: u64,
    /// How many are in each state.
    pub(crate) counts: Counts,
    /// What asking took, nanoseconds a page.
    #[serde(default)]
    pub(crate) ns_per_page: f64,
    /// The state of each page, as runs of `[pages, state]`.
    pub(crate) runs: Residency,
}

impl MapFile {
    /// The map of memories as they are now.
    ///
    /// # Errors
    /// When the probe cannot be used, or a memory has gone.
    pub(crate) fn of(opened: &Opened, choice: ProbeChoice) -> Result<Self, End> {
        let left_out = opened.left_out.clone();
        let mut file = Self { pid: 0, probe: String::new(), exact: true, memories: Vec::new(), left_out };
        for memory in &opened.memories {
            let probe = ChosenProbe::new(choice, memory).map_err(end_of)?;
            let map = MemoryMap::of(memory, &probe)?;
            file.pid = memory.process().pid();
            file.probe = probe.name().to_owned();
            file.exact &= probe.is_exact();
            file.memories.push(map);
        }
        Ok(file)
    }

    /// Reads a file, and checks that each map is of the memory whose size it gives.
    ///
    /// # Errors
    /// When it cannot be read, or is something else.
    pub(crate) fn read(path: &Path) -> Result<Self, End> {
        let shown = path.display();
        let text =
            std::fs::read(path).map_err(|e| End::text(ExitCode::Failure, format!("cannot read {shown}: {e}")))?;
        let not_a_map = |why: String| {
            End::text(ExitCode::Usage, format!("{shown} is not what `memory-agent map --json` prints: {why}"))
        };
        let file: Self = serde_json::from_slice(&text).map_err(|e| not_a_map(e.to_string()))?;
        match file.memories.iter().find(|memory| memory.runs.len() != memory.pages) {
            Some(memory) => {
                Err(not_a_map(format!("{} has {} pages and runs of {}", memory.name, memory.pages, memory.runs.len())))
            }
            None => Ok(file),
        }
    }
}

impl MemoryMap {
    /// The map of a memory as it is now.
    ///
    /// # Errors
    /// When it has gone, or the kernel refuses.
    pub(crate) fn of(memory: &ProcessMemory, probe: &ChosenProbe) -> Result<Self, End> {
        let pages = memory.mapping().pages();
        let started = Instant::now();
        let runs = probe.residency(memory, 0..pages).map_err(end_of)?;
        let ns_per_page = started.elapsed().as_nanos() as f64 / pages.max(1) as f64;
        // What was found is that process's.
        memory.check().map_err(end_of)?;
        Ok(Self {
            name: memory.name().to_owned(),
            address: memory.address(),
            file_offset: memory.file_offset(),
            pages,
            counts: runs.counts(),
            ns_per_page,
            runs,
        })
    }
}

#[cfg(test)]
mod tests {
    use memory_agent::PageState;

    use super::*;

    fn example() -> MapFile {
        let mut runs = Residency::uniform(100, PageState::Hole);
        runs.set(10..30, PageState::Swapped);
        let map = MemoryMap {
            name: "/memfd:ram".into(),
            address: 0x7000,
            file_offset: 0,
            pages: 100,
            counts: runs.counts(),
            ns_per_page: 1.5,
            runs,
        };
        MapFile { pid: 7, probe: "page-cache".into(), exact: true, memories: vec![map], left_out: Vec::new() }
    }

    fn read(text: &str) -> Result<MapFile, End> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        MapFile::read(file.path())
    }

    #[test]
    fn what_is_written_is_read() {
        let text = serde_json::to_string(&example()).unwrap();
        assert!(text.contains(r#""runs":[[10,"hole"],[20,"swapped"],[70,"hole"]]"#), "{text}");
        assert_eq!(read(&text).unwrap().memories[0].runs, example().memories[0].runs);
    }

    #[test]
    fn what_is_no_map_is_refused() {
        let mut other = example();
        other.memories[0].pages = 101;
        for text in ["", "{}", "[1]", &serde_json::to_string(&other).unwrap()] {
            assert_eq!(read(text).unwrap_err().code(), u8::from(ExitCode::Usage), "{text}");
        }
    }
}
