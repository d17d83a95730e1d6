//! Keeping what there is of a guest: its memory as a raw image, and everything else as JSON beside it.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memory_agent::{PAGE_SIZE, PageNumber, PageOutError, PageRange, PageState};
use serde::{Deserialize, Serialize};

use crate::machine::{Machine, MachineError, MachineSpec};
use crate::ram::{RamError, RamPage};

/// Pages of one snapshot, read at a time.
const WINDOW: u64 = 4096;
const BATCH: u64 = 64;

/// Why a guest could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// It would not be whole.
    #[error("the guest runs, and its memory would be of many moments: `thermocline ctl pause` first")]
    Running,
    /// The file.
    #[error("{path}: {cause}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// What was kept, in pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpReport {
    /// Pages written.
    pub pages: u64,
    /// Holes, which read as zeros.
    pub holes: u64,
    /// Pages that never came here: they read as zeros too, and should not.
    pub missing: u64,
}

/// What lies beside the image.
#[derive(Serialize)]
struct Companion<'a> {
    machine: MachineSpec,
    state: serde_json::Value,
    /// First page and number of pages, in RAM page numbers.
    missing: Vec<(RamPage, u64)>,
    report: &'a DumpReport,
}

/// Writes guest RAM to a sparse file at `to`, each byte at its guest physical address, and everything else to the same name with
/// `.json` behind it. Both are new. `missing` are pages that have not come.
///
/// # Errors
/// When the guest runs, or a file cannot be written.
pub fn write(machine: &Machine, missing: &[Range<RamPage>], to: &Path) -> Result<DumpReport, DumpError> {
    if machine.is_running() {
        return Err(DumpError::Running);
    }
    let ram = machine.ram();
    let (image, mut name) = (create(to)?, to.as_os_str().to_owned());
    name.push(".json");
    let beside = create(Path::new(&name))?;
    let failed = |cause| DumpError::File { path: to.into(), cause };
    let end = ram.layout().regions().last().map_or(0, |region| region.start + region.length);
    image.set_len(end).map_err(failed)?;
    let absent: u64 = missing.iter().map(PageRange::page_count).sum();
    let mut report = DumpReport { missing: absent, ..DumpReport::default() };
    let mut buffer = vec![0; (BATCH * PAGE_SIZE) as usize];
    let all = ram.all_pages();
    for start in all.pages().step_by(WINDOW as usize) {
        let window = all.intersection(&start.run(WINDOW));
        let snapshot = ram.snapshot_swapped(std::slice::from_ref(&window))?;
        for run in snapshot.runs() {
            if run.state == PageState::Hole {
                report.holes += run.pages.page_count();
                continue;
            }
            report.pages += run.pages.page_count();
            // Pages of two regions that follow one another do not follow one another in guest physical addresses.
            for part in ram.layout().split(run.pages) {
                for start in part.pages.pages().step_by(BATCH as usize) {
                    let batch = part.pages.intersection(&start.run(BATCH));
                    let bytes = &mut buffer[..batch.byte_count() as usize];
                    ram.read_swapped(batch.clone(), bytes)?;
                    let address = ram.layout().address_of(batch.start).unwrap_or_default();
                    image.write_all_at(bytes, address).map_err(failed)?;
                }
            }
        }
        match snapshot.restore_residency() {
            Ok(_) => {}
            Err(e)
                if matches!(
                    e.page_out(),
                    Some(PageOutError::Kept(_) | PageOutError::NoSwap | PageOutError::GroupSwapFull(_))
                ) => {}
            Err(e) => return Err(e.into()),
        }
    }
    report.holes = report.holes.saturating_sub(absent);
    let companion = Companion {
        machine: machine.describe(),
        state: machine.save()?.for_people().map_err(MachineError::from)?,
        missing: missing.iter().map(|run| (run.start, run.page_count())).collect(),
        report: &report,
    };
    serde_json::to_writer(&beside, &companion).map_err(|e| DumpError::File { path: name.into(), cause: e.into() })?;
    Ok(report)
}

fn create(path: &Path) -> Result<File, DumpError> {
    let new = OpenOptions::new().write(true).create_new(true).open(path);
    new.map_err(|cause| DumpError::File { path: path.into(), cause })
}
