//! Landing: how pages get from the wire into guest RAM.
//!
//! Allocating a page costs far more than receiving it, so warm batches are written by a thread of their own while the
//! next is received, and cold ones by another, which also pages them out. One thread each: writers of one file wait for
//! one another in the kernel (mm/shmem.c, `shmem_file_write_iter` holds the inode's lock), and faulting pages in through
//! the mapping, which several threads could do at once, costs twice as much a page. Order is kept where it matters: a page
//! that is still on its way to guest RAM is waited for before it is written again.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

use memory_agent::{ByteSize, PageOutError, PageOutReport};

use super::DestinationError;
use super::cold_window::ColdWindow;
use crate::host::thread;
use crate::migration::plan::Missing;
use crate::migration::stoppable::in_this_span;
use crate::migration::wire::{Lane, PageBatch};
use crate::ram::{GuestRam, PageSet, RamError, RamPage};

/// Batches that may wait for a thread.
const QUEUE: usize = 4;

struct Job {
    batch: PageBatch,
    payload: Vec<u8>,
}

/// Jobs that are not done yet, and the first error of one.
#[derive(Default)]
struct Pending {
    jobs: Mutex<(usize, Option<RamError>)>,
    done: Condvar,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, (usize, Option<RamError>)> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self) {
        self.lock().0 += 1;
    }

    fn finish(&self, result: Result<(), RamError>) {
        let mut jobs = self.lock();
        jobs.0 -= 1;
        if let Err(e) = result {
            jobs.1.get_or_insert(e);
        }
        self.done.notify_all();
    }

    fn wait(&self) -> Result<(), RamError> {
        let mut jobs = self.lock();
        while jobs.0 > 0 {
            jobs = self.done.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
        jobs.1.take().map_or(Ok(()), Err)
    }
}

/// Puts pages into guest RAM.
pub(super) struct Landing<'env> {
    ram: &'env GuestRam,
    warm: SyncSender<Job>,
    cold: SyncSender<Job>,
    pending: Arc<Pending>,
    recycled: (Sender<Vec<u8>>, Receiver<Vec<u8>>),
    /// Pages handed to a thread since all were last waited for.
    under_way: PageSet,
    /// Pages with bytes in them here.
    landed: PageSet,
    /// Pages that the source has said anything about.
    accounted: PageSet,
    /// Pages that come after the guest.
    missing: Missing,
    cold_window: Arc<ColdWindow>,
    can_page_out: Arc<AtomicBool>,
}

/// Everything has landed that comes before the guest.
#[derive(Clone)]
pub(super) struct Landed {
    cold_window: Arc<ColdWindow>,
    can_page_out: Arc<AtomicBool>,
}

impl Landed {
    /// More cold pages have landed: a window of them is paged out, or `most` are.
    pub(super) fn landed(
        &self,
        ram: &GuestRam,
        runs: impl Iterator<Item = Range<RamPage>>,
        most: u64,
    ) -> Result<(), RamError> {
        keep(&self.cold_window, &self.can_page_out, ram, runs, most)
    }

    /// Pages out the last, incomplete window.
    pub(super) fn page_out_rest(&self, ram: &GuestRam) -> Result<PageOutReport, RamError> {
        if self.can_page_out.load(Ordering::Relaxed) {
            self.cold_window.page_out(ram)
        } else {
            Ok(PageOutReport::default())
        }
    }
}

/// Has cold pages paged out again, for as long as the host can.
fn keep(
    cold_window: &ColdWindow,
    can_page_out: &AtomicBool,
    ram: &GuestRam,
    runs: impl Iterator<Item = Range<RamPage>>,
    most: u64,
) -> Result<(), RamError> {
    if !can_page_out.load(Ordering::Relaxed) {
        return Ok(());
    }
    let result = cold_window.landed(ram, runs, most);
    let Some(e) = result.as_ref().err().and_then(RamError::page_out) else { return result };
    if let PageOutError::Kept(_) = e {
        // The guest has touched every one of them meanwhile, and wants them.
        return Ok(());
    }
    // Content is whole; only the memory it takes is not what was wanted.
    tracing::warn!("cold pages stay in memory here: {e}");
    can_page_out.store(false, Ordering::Relaxed);
    Ok(())
}

impl<'env> Landing<'env> {
    /// Starts the threads, which end with the scope.
    pub(super) fn new<'scope>(
        scope: &'scope Scope<'scope, 'env>,
        ram: &'env GuestRam,
        window: ByteSize,
        can_page_out: bool,
    ) -> Result<Self, DestinationError> {
        let pages = ram.pages();
        let (warm_sender, warm) = sync_channel(QUEUE);
        let (cold_sender, cold) = sync_channel(QUEUE);
        let landing = Self {
            ram,
            warm: warm_sender,
            cold: cold_sender,
            pending: Arc::default(),
            recycled: channel(),
            under_way: PageSet::new(pages),
            landed: PageSet::new(pages),
            accounted: PageSet::new(pages),
            missing: Missing::new(pages),
            cold_window: Arc::new(ColdWindow::new(pages, window)),
            can_page_out: Arc::new(AtomicBool::new(can_page_out)),
        };
        landing.spawn(scope, "land-warm", warm, None)?;
        landing.spawn(scope, "land-cold", cold, Some(Arc::clone(&landing.cold_window)))?;
        Ok(landing)
    }

    fn spawn<'scope>(
        &self,
        scope: &'scope Scope<'scope, 'env>,
        name: &str,
        jobs: Receiver<Job>,
        cold_window: Option<Arc<ColdWindow>>,
    ) -> Result<(), DestinationError> {
        let ram = self.ram;
        let pending = Arc::clone(&self.pending);
        let recycled = self.recycled.0.clone();
        let can_page_out = Arc::clone(&self.can_page_out);
        let land = in_this_span(move || {
            for Job { batch, payload } in jobs {
                let mut result =
                    batch.runs.iter().try_for_each(|(run, bytes)| ram.land_pages(run.start, &payload[bytes.clone()]));
                if let Some(cold_window) = &cold_window {
                    let runs = batch.runs.into_iter().map(|(run, _)| run);
                    result = result.and_then(|()| keep(cold_window, &can_page_out, ram, runs, u64::MAX));
                }
                let _ = recycled.send(payload);
                pending.finish(result);
            }
        });
        thread(name)
            .and_then(|thread| thread.stack_size(256 << 10).spawn_scoped(scope, land))
            .map(drop)
            .map_err(|e| DestinationError::Thread(e.to_string()))
    }

    /// Number of pages of guest RAM.
    pub(super) fn pages(&self) -> u64 {
        self.accounted.universe()
    }

    /// A buffer for the next frame.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.recycled.1.try_recv().unwrap_or_default()
    }

    /// Hands a batch to a thread.
    pub(super) fn land(&mut self, batch: PageBatch, payload: Vec<u8>) -> Result<(), DestinationError> {
        if batch.runs.iter().any(|(run, _)| self.under_way.count_in(run.clone()) > 0) {
            self.drain()?;
        }
        for (run, _) in &batch.runs {
            self.under_way.insert_range(run.clone());
            self.landed.insert_range(run.clone());
            self.accounted.insert_range(run.clone());
            if batch.lane == Lane::Hot {
                self.cold_window.warmed(run.clone());
            }
        }
        let queue = match batch.lane {
            Lane::Hot => &self.warm,
            Lane::Cold => &self.cold,
        };
        self.pending.add();
        queue.send(Job { batch, payload }).map_err(|_| DestinationError::Thread("it has ended".into()))
    }

    /// Takes note of pages that read as zeros; those that had something in them here become holes.
    pub(super) fn zeros(&mut self, ranges: &[Range<RamPage>]) -> Result<(), DestinationError> {
        for range in ranges {
            self.empty(range)?;
        }
        Ok(())
    }

    /// Takes note of pages that come after the guest; what is here of them is out of date, and must not be seen.
    pub(super) fn later(&mut self, ranges: &[Range<RamPage>]) -> Result<(), DestinationError> {
        for range in ranges {
            self.empty(range)?;
            self.missing.later(range.clone());
        }
        Ok(())
    }

    /// Makes holes of pages that had something in them here.
    fn empty(&mut self, range: &Range<RamPage>) -> Result<(), DestinationError> {
        if range.start > range.end || range.end > self.ram.all_pages().end {
            return Err(RamError::OutOfRange { range: range.clone(), pages: self.pages() }.into());
        }
        if self.under_way.count_in(range.clone()) > 0 {
            self.drain()?;
        }
        for run in self.landed.runs_in(range.clone()) {
            self.ram.punch(run.clone())?;
            self.cold_window.warmed(run);
        }
        self.landed.remove_range(range.clone());
        self.accounted.insert_range(range.clone());
        Ok(())
    }

    /// Waits until everything handed out is in guest RAM.
    pub(super) fn drain(&mut self) -> Result<(), DestinationError> {
        self.pending.wait()?;
        self.under_way.clear();
        Ok(())
    }

    /// Whether the source has said something about every page.
    pub(super) fn check_complete(&self) -> Result<(), DestinationError> {
        match self.pages() - self.accounted.len() {
            0 => Ok(()),
            missing => Err(DestinationError::Incomplete(missing)),
        }
    }

    /// The end of landing, and what comes after the guest.
    pub(super) fn finish(mut self) -> Result<(Landed, Missing), DestinationError> {
        self.drain()?;
        Ok((Landed { cold_window: self.cold_window, can_page_out: self.can_page_out }, self.missing))
    }
}
