//! What can be done with a machine from outside, whoever asks: the API socket or a signal.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memory_agent::{AgentOptions, ByteSize, Metrics, PAGE_SIZE, picture};
use vmm_sys_util::eventfd::EventFd;

use super::{
    AgentStatus, Answer, Failure, FollowingStatus, MigrateRequest, PagesReport, Request, RunState, Status, tail_metrics,
};
use crate::dump::{self, DumpError};
use crate::exit::ExitCode;
use crate::machine::{Machine, MachineError};
use crate::migration::cancel::Cancel;
use crate::migration::destination::Tail;
use crate::migration::link::{Address, AddressError, Link, LinkError, Listener};
use crate::migration::progress::{Observer, Report};
use crate::migration::rendezvous::{JoinError, Rendezvous};
use crate::migration::source::{self, Following, SourceError};
use crate::migration::wire::{Channel, Session};
use crate::ram::RamWatch;

/// Most parts that a picture may have.
const MAX_CELLS: u32 = 1 << 16;
/// How long a migration may take to see that nobody waits for it any more.
const GIVEN_UP_BY_THEN: Duration = Duration::from_secs(10);

/// How a monitor ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// Somebody asked it to.
    Quit,
    /// The guest runs elsewhere now.
    Migrated,
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// There is no guest yet.
    #[error("no guest has arrived here yet")]
    NoGuest,
    /// A migration is under way.
    #[error("a migration is under way; wait for it, or end it with `thermocline ctl cancel-migration`")]
    Migrating,
    /// No migration is under way.
    #[error("no migration is under way")]
    NotMigrating,
    /// The guest may run elsewhere.
    #[error("the guest was handed over and may run at the destination; `resume --force` if you know that it does not")]
    HandedOver,
    /// Pages are only here.
    #[error(
        "the guest runs elsewhere, and {0} pages that it may need are only here; `thermocline ctl reconnect` if the connection is gone, `quit --force` to give them and with them the guest up"
    )]
    Following(u64),
    /// Not all of the guest's memory is here.
    #[error(
        "{0} pages of the guest's memory are still to come from where it was; wait until `thermocline ctl status` shows no `tail`"
    )]
    StillComing(u64),
    /// Nothing follows a guest.
    #[error("no pages are on their way that a connection could be made for")]
    NothingFollows,
    /// No way given.
    #[error("say where the other side listens (--to), or where to listen for it (--listen)")]
    NoWay,
    /// The other side cannot be reached.
    #[error("no new connection: {0}")]
    Join(#[from] JoinError),
    /// The guest could not be kept.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// The address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] LinkError),
    /// The host gives no random bytes or no threads.
    #[error("the host refuses: {0}")]
    Host(#[from] std::io::Error),
    /// Its memory has been given back.
    #[error("the guest runs elsewhere, and its memory has been given back to this host: it can never run here again")]
    Hollow,
    /// The address to migrate to is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The migration failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] crate::ram::RamError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Nobody has a map.
    #[error("there is no map yet: the memory agent has not seen all of guest RAM, or --agent-budget is 0")]
    NoMap,
    /// The metrics cannot be written.
    #[error("the metrics cannot be written: {0}")]
    Metrics(String),
    /// A range is not guest RAM.
    #[error("{start:#x} to {end:#x} is not all guest RAM, or not whole pages")]
    Range {
        /// First guest physical address.
        start: u64,
        /// First behind it.
        end: u64,
    },
    /// Too many parts.
    #[error("{0} cells are too many, {MAX_CELLS} are possible")]
    Cells(u32),
}

impl From<VmmError> for Failure {
    fn from(e: VmmError) -> Self {
        let exit_code = match &e {
            VmmError::Source(e) => ExitCode::of_source(e),
            VmmError::Address(_) => ExitCode::Usage,
            _ => ExitCode::Failure,
        };
        Self { text: e.to_string(), exit_code: exit_code as u8 }
    }
}

#[derive(Debug, Default)]
struct State {
    machine: Option<Arc<Machine>>,
    migration: Option<Arc<Cancel>>,
    handed_over: bool,
    /// Memory of the guest that was handed over has been given back.
    hollow: bool,
    /// What follows a guest that runs elsewhere.
    following: Option<Arc<Following>>,
    /// What is still to come of the guest that runs here.
    tail: Option<Arc<Tail>>,
    farewell: Option<Farewell>,
}

/// A monitor's machine and what is being done with it.
#[derive(Debug)]
pub struct Vmm {
    /// How the memory agent of a machine works, if it has one.
    agent: Option<AgentOptions>,
    state: Mutex<State>,
    ended: EventFd,
}

impl Vmm {
    /// A monitor that has no machine yet; with `agent` the machine's memory is watched.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(agent: Option<AgentOptions>) -> std::io::Result<Self> {
        Ok(Self { agent, state: Mutex::default(), ended: EventFd::new(libc::EFD_NONBLOCK)? })
    }

    /// The machine is here; with `tail`, not all of its memory.
    pub fn set_machine(&self, machine: Arc<Machine>, tail: Option<Arc<Tail>>) {
        // One handler of faults a mapping: the agent may need it too, and begins when all pages have come.
        if tail.is_none() {
            self.watch_ram(&machine);
        }
        let mut state = self.lock();
        state.machine = Some(machine);
        state.tail = tail;
    }

    /// All of the machine's memory is here.
    pub fn set_whole(&self) {
        let machine = {
            let mut state = self.lock();
            state.tail.take().and(state.machine.clone())
        };
        if let Some(machine) = machine {
            self.watch_ram(&machine);
        }
    }

    fn watch_ram(&self, machine: &Machine) {
        if let Some(Err(e)) = self.agent.map(|options| machine.watch_ram(options)) {
            tracing::warn!("guest RAM is not watched: {e}");
        }
    }

    /// Pages of a guest that runs elsewhere which are only here.
    pub fn only_here(&self) -> u64 {
        self.lock().following.as_ref().map_or(0, |following| following.left())
    }

    /// The guest has ended or is to: nobody need keep pages for it.
    pub fn end_tail(&self) {
        let tail = self.lock().tail.take();
        if let Some(tail) = tail {
            tail.end();
        }
    }

    /// The machine, if it is here.
    pub fn machine(&self) -> Option<Arc<Machine>> {
        self.lock().machine.clone()
    }

    /// Readable once the monitor should end; then [`Vmm::farewell`] says why.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// Why the monitor should end.
    pub fn farewell(&self) -> Option<Farewell> {
        self.lock().farewell.clone()
    }

    /// Does what a request asks. A migration shows its progress to `observer` and can be given up by `cancel`. After
    /// [`Request::Quit`], and after a migration, the monitor still has to be ended.
    ///
    /// # Errors
    /// Why it was not done.
    pub fn handle(
        &self,
        request: &Request,
        cancel: &Arc<Cancel>,
        observer: &mut dyn Observer,
    ) -> Result<Answer, VmmError> {
        match request {
            Request::Status {} => Ok(Answer::Status(self.status())),
            Request::Pause {} => self.pause().map(|()| Answer::Done),
            Request::Resume { force } => self.resume(*force).map(|()| Answer::Done),
            // Whoever serves the request ends the monitor once the answer is out.
            Request::Quit { force } => match self.only_here() {
                left @ 1.. if !force => Err(VmmError::Following(left)),
                _ => Ok(Answer::Done),
            },
            Request::Pages { cells, from_agent } => self.pages(*cells, *from_agent).map(Answer::Pages),
            Request::Metrics {} => Ok(Answer::Metrics(self.metrics()?)),
            Request::PageOut { ranges } => self.page_out(ranges.as_deref()),
            Request::CancelMigration {} if self.only_here() > 0 => Err(VmmError::Following(self.only_here())),
            Request::CancelMigration {} => {
                self.lock().migration.as_ref().ok_or(VmmError::NotMigrating)?.cancel();
                Ok(Answer::Done)
            }
            Request::Migrate(request) => self.migrate(request, cancel, observer).map(Answer::Migrated),
            Request::Dump { to } => {
                let (machine, tail) = {
                    let state = self.lock();
                    (state.machine.clone().ok_or(VmmError::NoGuest)?, state.tail.clone())
                };
                let missing = tail.map(|tail| tail.missing()).unwrap_or_default();
                Ok(Answer::Dump(dump::write(&machine, &missing, to)?))
            }
            Request::Reconnect { to, listen } => {
                self.reconnect(to.as_deref(), listen.as_deref()).map(|()| Answer::Done)
            }
        }
    }

    /// Goes on with a migration whose connection is gone, from either side.
    fn reconnect(&self, to: Option<&str>, listen: Option<&str>) -> Result<(), VmmError> {
        let (following, tail) = {
            let state = self.lock();
            (state.following.clone(), state.tail.clone())
        };
        if following.is_none() && tail.is_none() {
            return Err(VmmError::NothingFollows);
        }
        let rendezvous = || match (&following, &tail) {
            (Some(following), _) => Some(&following.rendezvous),
            (_, tail) => tail.as_ref().map(|tail| tail.rendezvous().as_ref()),
        };
        match (to, listen) {
            (Some(to), None) => {
                let address: Address = to.parse()?;
                if let Some(rendezvous) = rendezvous() {
                    rendezvous.connect(&address, &[Channel::Bulk, Channel::Faults])?;
                }
                if let Some(following) = &following {
                    following.set_address(address);
                }
                Ok(())
            }
            (None, Some(listen)) => {
                let listener = Listener::bind(&listen.parse()?)?;
                let (following, tail) = (following.clone(), tail.clone());
                std::thread::Builder::new().name("reconnect".into()).spawn(move || match (following, tail) {
                    (Some(following), _) => following.rendezvous.serve(&listener),
                    (_, Some(tail)) => tail.rendezvous().serve(&listener),
                    _ => {}
                })?;
                Ok(())
            }
            _ => Err(VmmError::NoWay),
        }
    }

    /// Ends the monitor, and a migration with it.
    pub fn end(&self, farewell: Farewell) {
        let mut state = self.lock();
        if let Some(migration) = &state.migration {
            migration.cancel();
        }
        state.farewell.get_or_insert(farewell);
        // The counter would have to be at its limit for this to fail, and then the event is set.
        let _ = self.ended.write(1);
    }

    fn migrate(
        &self,
        request: &MigrateRequest,
        cancel: &Arc<Cancel>,
        observer: &mut dyn Observer,
    ) -> Result<Report, VmmError> {
        let address: Address = request.to.parse()?;
        let options = source::Options::from(request);
        let following = match options.follows() {
            true => Some(Arc::new(Following::new(Rendezvous::new(Session::new()?), Some(address.clone())))),
            false => None,
        };
        let machine = {
            let mut state = self.lock();
            let machine = state.machine.clone().ok_or(VmmError::NoGuest)?;
            if state.handed_over {
                return Err(VmmError::HandedOver);
            }
            if state.migration.is_some() {
                return Err(VmmError::Migrating);
            }
            // What has not come looks like a hole, and would be sent as zeros.
            if let Some(tail) = &state.tail {
                return Err(VmmError::StillComing(tail.status().missing));
            }
            state.migration = Some(Arc::clone(cancel));
            state.following.clone_from(&following);
            machine
        };
        // Migration looks for itself, and needs the CPU.
        let aside = machine.ram_watch().map(RamWatch::suspend);
        let result = Link::connect(&address)
            .map_err(SourceError::from)
            .and_then(|link| source::migrate(machine.as_ref(), link, &options, following.as_ref(), cancel, observer));
        drop(aside);
        let mut state = self.lock();
        state.migration = None;
        state.following = None;
        state.hollow = result.as_ref().is_ok_and(|report| report.tail.is_some());
        state.handed_over = matches!(result, Ok(_) | Err(SourceError::Unconfirmed(_)));
        Ok(result?)
    }

    fn status(&self) -> Status {
        let state = self.lock();
        let run_state = match &state.machine {
            None => RunState::Waiting,
            Some(_) if state.handed_over => RunState::HandedOver,
            Some(_) if state.following.as_ref().is_some_and(|following| following.left() > 0) => RunState::Following,
            Some(_) if state.migration.is_some() => RunState::Migrating,
            Some(machine) if machine.is_running() => RunState::Running,
            Some(_) => RunState::Paused,
        };
        Status {
            state: run_state,
            memory: ByteSize(state.machine.as_ref().map_or(0, |m| m.ram().layout().bytes())),
            cpus: state.machine.as_ref().map_or(0, |m| m.cpus()),
            pid: std::process::id(),
            agent: state.machine.as_ref().and_then(|machine| machine.ram_watch()).map(AgentStatus::of),
            tail: state.tail.as_ref().map(|tail| tail.status()),
            following: state.following.as_ref().map(|following| FollowingStatus {
                left: following.left(),
                connected: following.is_connected(),
                to: following.address().map(|address| address.to_string()),
            }),
        }
    }

    fn pause(&self) -> Result<(), VmmError> {
        let machine = self.at_rest(false)?;
        let was_running = machine.is_running();
        let paused = machine.pause();
        if paused.is_err() && was_running {
            machine.resume();
        }
        Ok(paused?)
    }

    fn resume(&self, force: bool) -> Result<(), VmmError> {
        if force {
            self.give_up_unconfirmed();
        }
        self.at_rest(force)?.resume();
        self.lock().handed_over = false;
        Ok(())
    }

    /// Whoever knows that the destination does not run the guest need not wait for its word: all of the guest is here.
    fn give_up_unconfirmed(&self) {
        let following = self.lock().following.clone();
        let Some(following) = following.filter(|following| following.left() > 0 && !following.is_confirmed()) else {
            return;
        };
        following.rendezvous.close();
        let deadline = Instant::now() + GIVEN_UP_BY_THEN;
        while self.lock().migration.is_some() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The machine, unless it is on its way or has gone.
    fn at_rest(&self, force: bool) -> Result<Arc<Machine>, VmmError> {
        let state = self.lock();
        if state.migration.is_some() {
            return Err(VmmError::Migrating);
        }
        if state.hollow {
            return Err(VmmError::Hollow);
        }
        if state.handed_over && !force {
            return Err(VmmError::HandedOver);
        }
        state.machine.clone().ok_or(VmmError::NoGuest)
    }

    fn pages(&self, cells: u32, from_agent: bool) -> Result<PagesReport, VmmError> {
        if cells > MAX_CELLS {
            return Err(VmmError::Cells(cells));
        }
        let machine = self.machine().ok_or(VmmError::NoGuest)?;
        let (residency, age) = if from_agent {
            machine.ram_watch().and_then(RamWatch::map).ok_or(VmmError::NoMap)?
        } else {
            (machine.ram().residency(0..machine.ram().pages())?, Duration::ZERO)
        };
        let cells = picture::cells(&residency, cells);
        Ok(PagesReport { counts: residency.counts(), cells, age_ms: age.as_millis() as u64 })
    }

    /// What Prometheus wants to know.
    fn metrics(&self) -> Result<String, VmmError> {
        let machine = self.machine().ok_or(VmmError::NoGuest)?;
        let watch = machine.ram_watch();
        let map = watch.and_then(RamWatch::counts);
        // Without an agent's map the kernel's own sums are as good.
        let map = map.or_else(|| Some((machine.ram().counts().ok()?, Duration::ZERO)));
        let cost = watch.map(RamWatch::cost).unwrap_or_default();
        let metrics = Metrics { pid: std::process::id(), map, cost };
        let status = self.status();
        let text = metrics
            .text()
            .and_then(|text| Ok(text + &tail_metrics::text(status.tail.as_ref(), status.following.as_ref())?));
        text.map_err(|e| VmmError::Metrics(e.to_string()))
    }

    fn page_out(&self, ranges: Option<&[(u64, u64)]>) -> Result<Answer, VmmError> {
        let machine = self.machine().ok_or(VmmError::NoGuest)?;
        let ram = machine.ram();
        let ranges = match ranges {
            None => vec![0..ram.pages()],
            Some(ranges) => ranges
                .iter()
                .map(|&(start, length)| {
                    let end = start.saturating_add(length);
                    page_range(ram, start, end).ok_or(VmmError::Range { start, end })
                })
                .collect::<Result<_, _>>()?,
        };
        Ok(Answer::PageOut(ram.page_out(&ranges)?))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guest physical addresses as RAM pages; `None` when they are not all RAM or not whole pages.
fn page_range(ram: &crate::ram::GuestRam, start: u64, end: u64) -> Option<Range<u64>> {
    if start >= end || !start.is_multiple_of(PAGE_SIZE) || !end.is_multiple_of(PAGE_SIZE) {
        return None;
    }
    let (first, last) = (ram.layout().page_of(start)?, ram.layout().page_of(end - 1)?);
    (last - first == (end - start) / PAGE_SIZE - 1).then_some(first..last + 1)
}
