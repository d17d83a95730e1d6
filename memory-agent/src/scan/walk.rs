//! Reading all of a memory file, in windows, and leaving it as it was.

use std::io;
use std::ops::{ControlFlow, Range};

use serde::{Deserialize, Serialize};

use super::{ScanError, ScanGuard};
use crate::memory::FileView;
use crate::page_number::{FilePage, PageNumber};
use crate::page_out::{PageOutError, PageOutReport};
use crate::page_range::PageRange;
use crate::page_state::{Counts, PAGE_SIZE, PageState};
use crate::residency::Run;

/// Pages read at a time.
const BATCH: u64 = 64;

/// Something that reads memory, from the first page to the last.
pub trait Reader {
    /// These pages come next, and are holes: they read as zeros.
    ///
    /// # Errors
    /// Ends the scan.
    fn hole(&mut self, pages: Range<FilePage>) -> io::Result<()>;

    /// These pages come next; `bytes` is what they held when they were read.
    ///
    /// # Errors
    /// Ends the scan.
    fn content(&mut self, pages: Range<FilePage>, bytes: &[u8]) -> io::Result<()>;
}

/// How far a scan is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanProgress {
    /// Pages passed.
    pub done: u64,
    /// Pages there are.
    pub pages: u64,
}

/// What a scan did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanReport {
    /// What the pages were right before they were read.
    pub pages: Counts,
    /// What became of those that were swapped.
    pub restored: PageOutReport,
    /// Whether it went to the end.
    pub complete: bool,
}

/// Reads pages of a memory file, in order, and pages out again what was swapped, a window at a time: of the pages that
/// were swapped never more than `window_pages` are in memory. Pages that their owner touches meanwhile stay.
///
/// It is not a snapshot: whoever has the memory goes on working with it. `show` is called now and then; when it breaks,
/// the scan ends early, with everything restored.
///
/// # Errors
/// When the memory cannot be read or the reader fails. What was swapped is paged out again then too, as well as possible.
pub fn scan(
    view: &FileView,
    pages: Range<FilePage>,
    window_pages: u64,
    reader: &mut dyn Reader,
    show: &mut dyn FnMut(ScanProgress) -> ControlFlow<()>,
) -> Result<ScanReport, ScanError> {
    let (guard, mapping) = (ScanGuard::of_view(view), view.mapping());
    let mut report = ScanReport { complete: true, ..ScanReport::default() };
    let mut buffer = vec![0; (BATCH * PAGE_SIZE) as usize];
    let window_pages = window_pages.max(1);
    let mut start = pages.start;
    while start < pages.end {
        let window = pages.intersection(&start.run(window_pages));
        let snapshot = guard.snapshot(&[mapping.of_file(&window)])?;
        let mut read_up_to = window.start;
        'window: for run in snapshot.runs() {
            let run = Run { pages: mapping.in_file(&run.pages), state: run.state };
            let mut page = run.pages.start;
            while page < run.pages.end {
                if run.state == PageState::Hole {
                    reader.hole(run.pages.clone()).map_err(ScanError::Reader)?;
                    page = run.pages.end;
                } else {
                    let batch = run.pages.intersection(&page.run(BATCH));
                    let bytes = &mut buffer[..batch.byte_count() as usize];
                    view.read(&batch, bytes)?;
                    reader.content(batch.clone(), bytes).map_err(ScanError::Reader)?;
                    page = batch.end;
                }
                read_up_to = page;
                if show(ScanProgress { done: page - pages.start, pages: pages.page_count() }).is_break() {
                    report.complete = false;
                    break 'window;
                }
            }
        }
        for run in snapshot.runs() {
            let read = mapping.in_file(&run.pages).intersection(&(pages.start..read_up_to));
            report.pages.count(run.state, read.page_count());
        }
        match snapshot.restore() {
            Ok(restored) => report.restored = report.restored.merge(restored),
            // The owner has touched every page of the window meanwhile, and wants them.
            Err(ScanError::PageOut(PageOutError::Kept(_))) => {}
            Err(e) => return Err(e),
        }
        if !report.complete {
            break;
        }
        start = window.end;
    }
    Ok(report)
}
