//! The background agent: a map that is kept fresh at a bounded cost.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::memory::Target;
use crate::page_range::PageRanges;
use crate::page_state::{Counts, PageState};
use crate::probe::{ChosenProbe, ProbeChoice, ProbeError, mapped};
use crate::residency::Residency;
use crate::swap;
use crate::sys;

/// Pages looked at in one go, at first.
const FIRST_SLICE: u64 = 1024;
/// And at most.
const LARGEST_SLICE: u64 = 1 << 16;
/// What a slice should cost: so long may somebody wait for the agent to step aside.
const SLICE_COST: Duration = Duration::from_millis(1);

/// How long somebody waits for it at most.
const STAND_ASIDE: Duration = Duration::from_millis(100);

/// Why an agent does not work.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The budget is none.
    #[error("a budget of {0} % of one core is not possible: use more than 0 and at most 100")]
    Budget(f64),
    /// The states of the pages could not be found out.
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

/// How an agent works.
#[derive(Clone, Copy, Debug)]
pub struct AgentOptions {
    /// Which probe it uses; `Auto` is an exact one where it is to restore.
    pub probe: ProbeChoice,
    /// How much of one core it may use, percent.
    pub budget: f64,
    /// How long after the beginning of a round the next one begins, at the earliest.
    pub interval: Duration,
    /// Whether it pages out again what readers other than the owner have swapped in.
    pub restore: bool,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self { probe: ProbeChoice::Auto, budget: 1.0, interval: Duration::from_secs(1), restore: true }
    }
}

/// What an agent has done and what that cost, all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentCost {
    /// Rounds over all memory that are complete.
    pub rounds: u64,
    /// Pages looked at.
    pub pages: u64,
    /// CPU time used, ns.
    pub cpu_ns: u64,
    /// Time since it began, ns.
    pub elapsed_ns: u64,
    /// How long the last round took, ns.
    pub round_ns: u64,
    /// Pages that were swapped at one look and in memory at the next, by their owner or by a reader.
    pub swapped_in: u64,
    /// Pages of these that a reader swapped in and that were paged out again.
    pub restored: u64,
}

impl AgentCost {
    /// What it has used of one core, percent.
    pub fn percent(&self) -> f64 {
        100.0 * self.cpu_ns as f64 / (self.elapsed_ns.max(1)) as f64
    }
}

/// What an agent knows.
#[derive(Clone, Debug)]
pub struct AgentMap {
    /// A map for each target; holes are exact as of when they were looked at, and so is all of it with an exact probe.
    pub maps: Vec<Residency>,
    /// How long ago the part looked at longest ago was.
    pub age: Duration,
}

#[derive(Default)]
struct State {
    maps: Vec<Residency>,
    /// When it began to watch, and when the last complete round began.
    began: Option<Instant>,
    complete: Option<Instant>,
    cost: AgentCost,
    name: &'static str,
    /// How many want it to stand aside.
    suspended: u32,
    /// Looking at a slice right now.
    busy: bool,
    /// The thread that does so.
    thread: i32,
    /// Whether that thread was made an ordinary one, to be done sooner.
    hurried: bool,
    stopped: bool,
}

/// A background agent: [`Agent::watch`] is its work, everything else can be called meanwhile from other threads.
pub struct Agent {
    options: AgentOptions,
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("options", &self.options).finish_non_exhaustive()
    }
}

/// An agent that stands aside until this is dropped.
#[derive(Debug)]
pub struct Suspended<'a>(&'a Agent);

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        self.0.lock().suspended -= 1;
        self.0.changed.notify_all();
    }
}

impl Agent {
    /// An agent that does nothing yet.
    ///
    /// # Errors
    /// [`AgentError::Budget`] when the budget is not possible.
    pub fn new(options: AgentOptions) -> Result<Self, AgentError> {
        if !(options.budget > 0.0 && options.budget <= 100.0) {
            return Err(AgentError::Budget(options.budget));
        }
        Ok(Self { options, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Watches the targets until [`Agent::stop`], in the calling thread, which from then on runs only when no other has
    /// anything to do (`SCHED_IDLE`) and within the budget.
    ///
    /// # Errors
    /// [`AgentError::Probe`] when the host does not tell, or a target has gone.
    pub fn watch(&self, targets: &[&dyn Target]) -> Result<(), AgentError> {
        // Without it the budget alone bounds what it takes.
        let _ = sys::run_when_idle();
        let probes: Vec<_> = targets.iter().map(|target| self.choose_probe(*target)).collect::<Result<_, _>>()?;
        {
            let mut state = self.lock();
            state.began = Some(Instant::now());
            state.thread = rustix::thread::gettid().as_raw_pid();
            state.name = probes.first().map_or("", ChosenProbe::name);
            let unknown = |target: &&dyn Target| Residency::uniform(target.mapping().pages(), PageState::Hole);
            state.maps = targets.iter().map(unknown).collect();
        }
        let mut pace = Pace { budget: self.options.budget / 100.0, slice: FIRST_SLICE };
        loop {
            let round = Instant::now();
            for (number, (target, probe)) in targets.iter().zip(&probes).enumerate() {
                let pages = target.mapping().pages();
                let mut page = 0;
                while page < pages {
                    let slice = page..pages.min(page + pace.slice);
                    page = slice.end;
                    let Some(cpu) = self.look(number, *target, probe, slice)? else { return Ok(()) };
                    if !self.sleep(pace.rest(cpu)) {
                        return Ok(());
                    }
                }
                probe.arm()?;
            }
            {
                let mut state = self.lock();
                state.complete = Some(round);
                state.cost.rounds += 1;
                state.cost.round_ns = round.elapsed().as_nanos() as u64;
                self.changed.notify_all();
            }
            if !self.sleep(self.options.interval.saturating_sub(round.elapsed())) {
                return Ok(());
            }
        }
    }

    /// The probe for a target. A hint goes on calling swapped what a reader has swapped in through the file, and whoever is to restore that
    /// has to see it.
    fn choose_probe(&self, target: &dyn Target) -> Result<ChosenProbe, ProbeError> {
        match self.options.probe {
            ProbeChoice::Auto if self.options.restore => Ok(ChosenProbe::exact()),
            choice => ChosenProbe::new(choice, target),
        }
    }

    /// Looks at one slice, and says what that cost; `None` once it should stop.
    fn look(
        &self,
        number: usize,
        target: &dyn Target,
        probe: &ChosenProbe,
        slice: Range<u64>,
    ) -> Result<Option<Duration>, AgentError> {
        {
            let mut state = self.lock();
            while state.suspended > 0 && !state.stopped {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stopped {
                return Ok(None);
            }
            // Also when whoever was in a hurry has not waited for it to stand aside.
            if std::mem::take(&mut state.hurried) {
                let _ = sys::run_when_idle();
            }
            state.busy = true;
        }
        let before = thread_time();
        let looked = probe.residency(target, slice).map(|found| {
            let swapped_in = self.swapped_in(number, &found);
            let restored = if self.options.restore { restore(target, &swapped_in) } else { 0 };
            (found, swapped_in, restored)
        });
        let mut state = self.lock();
        state.busy = false;
        self.changed.notify_all();
        let (found, swapped_in, restored) = looked?;
        for run in found.runs() {
            state.maps[number].set(run.pages, run.state);
        }
        state.cost.pages += found.len();
        let cpu = thread_time().saturating_sub(before);
        state.cost.cpu_ns += cpu.as_nanos() as u64;
        state.cost.swapped_in += swapped_in.page_count();
        state.cost.restored += restored;
        Ok(Some(cpu))
    }

    /// Pages of a slice that were swapped at the last look and are in memory now.
    fn swapped_in(&self, number: usize, found: &Residency) -> PageRanges {
        let state = self.lock();
        let map = &state.maps[number];
        let resident = found.ranges_of(PageState::Resident);
        resident
            .flat_map(|range| map.runs_in(range))
            .filter(|run| run.state == PageState::Swapped)
            .map(|run| run.pages)
            .collect()
    }

    /// What it knows now; `None` before it has seen everything once.
    pub fn map(&self) -> Option<AgentMap> {
        let state = self.lock();
        let age = state.complete?.elapsed();
        Some(AgentMap { maps: state.maps.clone(), age })
    }

    /// How many pages are in each state, of all targets, and how old that is; `None` before it has seen everything once.
    pub fn counts(&self) -> Option<(Counts, Duration)> {
        let state = self.lock();
        let counts = state.maps.iter().fold(Counts::default(), |sum, map| sum + map.counts());
        Some((counts, state.complete?.elapsed()))
    }

    /// What it has done and what that cost.
    pub fn cost(&self) -> AgentCost {
        let state = self.lock();
        let elapsed_ns = state.began.map_or(0, |began| began.elapsed().as_nanos() as u64);
        AgentCost { elapsed_ns, ..state.cost }
    }

    /// The probe that it uses.
    pub fn probe(&self) -> &'static str {
        self.lock().name
    }

    /// Has it stand aside until the answer is dropped; returns when it does, or a little later at the latest.
    pub fn suspend(&self) -> Suspended<'_> {
        let mut state = self.lock();
        state.suspended += 1;
        if state.busy {
            // On a busy host a thread that runs when others idle would take long to come to an end, and the kernel's locks
            // on the memory file with it. Without the right to hurry it, it is waited for in vain.
            state.hurried = sys::run_as_others_do(state.thread).is_ok();
        }
        let waited = self.changed.wait_timeout_while(state, STAND_ASIDE, |state| state.busy);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Suspended(self)
    }

    /// Ends its work soon.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Waits until so many rounds are complete, or it is stopped; false after the time.
    pub fn wait_for_rounds(&self, rounds: u64, most: Duration) -> bool {
        let state = self.lock();
        let waiting = |state: &mut State| state.cost.rounds < rounds && !state.stopped;
        let waited = self.changed.wait_timeout_while(state, most, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.cost.rounds >= rounds
    }

    /// Sleeps; false once it should stop.
    fn sleep(&self, time: Duration) -> bool {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, time, |state| !state.stopped);
        !waited.unwrap_or_else(PoisonError::into_inner).0.stopped
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How an agent stays within its budget.
struct Pace {
    /// Share of one core.
    budget: f64,
    slice: u64,
}

impl Pace {
    /// How long to rest after a slice that cost so much; fits the next slice to the cost.
    fn rest(&mut self, cpu: Duration) -> Duration {
        if cpu > SLICE_COST {
            self.slice = (self.slice / 2).max(64);
        } else if cpu < SLICE_COST / 3 {
            self.slice = (self.slice * 2).min(LARGEST_SLICE);
        }
        cpu.div_f64(self.budget).saturating_sub(cpu)
    }
}

/// Pages out again what readers have swapped in: pages that are in memory and that the owner does not map. How many.
fn restore(target: &dyn Target, swapped_in: &PageRanges) -> u64 {
    let mut unwanted = PageRanges::new();
    let mapping = target.mapping();
    for range in swapped_in {
        // Where that cannot be told, nobody's page is touched.
        let Ok(mapped) = mapped(target, range) else { return 0 };
        let others = mapped.runs().filter(|run| run.state != PageState::Resident);
        unwanted.extend(others.map(|run| mapping.in_file(&run.pages)));
    }
    if unwanted.is_empty() {
        return 0;
    }
    // Where it cannot be told what was read ahead, paging it out would have it written again.
    if !swap::all_frees_at_once().is_ok_and(|at_once| at_once || sys::has_cachestat()) {
        return 0;
    }
    // Not through the owner's page tables: whatever they map, the owner is taken to want.
    match target.view().map(|view| view.page_out(&unwanted)) {
        Ok(Ok(report)) => report.swapped,
        // Whoever reads still has them mapped, or there is no room; they stay, as they would without an agent.
        _ => 0,
    }
}

/// CPU time of the calling thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}
