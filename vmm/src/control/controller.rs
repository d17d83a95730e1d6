//! What can be done with a machine from outside, whoever asks: the API socket or a signal.
//!
//! Where the machine is and what may happen to it there says `Life`; here is what follows from it, and nothing else
//! decides when the monitor ends.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memory_agent::{AgentOptions, ByteSize};
use vmm_sys_util::eventfd::EventFd;

use super::error::VmmError;
use super::failure::Failure;
use super::life::{Coming, ExitReason, Life, MigrationEnd};
use super::migration::{Handles, Migration};
use super::{AgentStatus, Answer, MigrateRequest, PostCopySourceStatus, Request, RunState, Status, memory};
use crate::devices::Handover;
use crate::dump;
use crate::host;
use crate::machine::Machine;
use crate::migration::channels::Channels;
use crate::migration::destination::PostCopy;
use crate::migration::link::{Address, Link, Listener};
use crate::migration::progress::{Progress, Report};
use crate::migration::source::{self, Options, PostCopyControl, SourceError};
use crate::migration::wire::{Channel, MigrationId};
use crate::ram::RamWatch;

/// How long a migration may take to see that nobody waits for it any more.
const GIVEN_UP_BY_THEN: Duration = Duration::from_secs(10);

impl Coming for Arc<PostCopy> {
    fn to_come(&self) -> u64 {
        self.status().missing
    }
}

#[derive(Debug, Default)]
struct State {
    life: Life<Arc<Machine>, Arc<PostCopy>, Arc<Migration>>,
    /// The last migration, under way or ended.
    last: Option<Arc<Migration>>,
    /// Clients that are to hear how it ended before the monitor does.
    answering: u32,
}

/// A monitor's machine and what is being done with it.
#[derive(Debug)]
pub struct Controller {
    /// How the memory agent of a machine works, if it has one.
    agent: Option<AgentOptions>,
    state: Mutex<State>,
    ended: EventFd,
    migrations: AtomicU64,
    /// The machine is being started anew.
    reboots: AtomicBool,
}

/// Somebody is being answered: the monitor does not end before this is dropped.
#[derive(Debug)]
pub(super) struct Answering<'a>(&'a Controller);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.lock().answering -= 1;
        self.0.end_if_due();
    }
}

impl Controller {
    /// A monitor that has no machine yet; with `agent` the machine's memory is watched.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(agent: Option<AgentOptions>) -> std::io::Result<Self> {
        let ended = EventFd::new(libc::EFD_NONBLOCK)?;
        Ok(Self {
            agent,
            state: Mutex::default(),
            ended,
            migrations: AtomicU64::new(0),
            reboots: AtomicBool::new(false),
        })
    }

    /// The machine is here; with `post_copy`, not all of its memory.
    ///
    /// # Errors
    /// When there is one already, or the monitor ends.
    pub fn set_machine(&self, machine: Arc<Machine>, post_copy: Option<Arc<PostCopy>>) -> Result<(), VmmError> {
        let is_whole = post_copy.is_none();
        self.lock().life.arrives(Arc::clone(&machine), post_copy)?;
        // One handler of faults a mapping: the agent may need it too, and begins when all pages have come.
        if is_whole {
            self.watch_ram(&machine);
        }
        Ok(())
    }

    /// All of the machine's memory is here.
    pub fn set_whole(&self) {
        let (post_copy, machine) = {
            let mut state = self.lock();
            (state.life.is_whole(), state.life.machine())
        };
        if let (Some(_), Ok(machine)) = (post_copy, machine) {
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
        self.lock().life.only_here()
    }

    /// The guest has ended or is to: nobody need keep pages for it.
    pub fn end_post_copy(&self) {
        let post_copy = self.lock().life.is_whole();
        if let Some(post_copy) = post_copy {
            post_copy.end();
        }
    }

    /// Starts the machine anew, in a thread of its own: its guest has asked for a reset. One that cannot be ends.
    pub fn reboot(self: &Arc<Self>) {
        if self.reboots.swap(true, Ordering::AcqRel) {
            return;
        }
        let controller = Arc::clone(self);
        let run = move || {
            let (machine, is_whole) = {
                let state = controller.lock();
                (state.life.machine(), state.life.coming().is_none())
            };
            if let Ok(machine) = machine {
                match machine.reboot(is_whole) {
                    Ok(()) => tracing::info!("the guest has reset its machine, which starts anew"),
                    Err(e) => machine.fail(format!("the guest has reset its machine, which cannot start anew: {e}")),
                }
            }
            controller.reboots.store(false, Ordering::Release);
            // A guest that has reset its machine again was not heard meanwhile.
            if let Some(machine) = controller.machine() {
                let _ = machine.end_event().write(1);
            }
        };
        let spawned = host::thread("reboot").and_then(|thread| thread.spawn(run));
        if let (Err(e), Some(machine)) = (spawned, self.machine()) {
            machine.fail(format!("the guest has reset its machine, which cannot start anew: {e}"));
        }
    }

    fn press_power_button(&self) -> Result<(), VmmError> {
        let machine = self.lock().life.at_rest()?;
        let button = machine.ports().power_button.clone().ok_or(VmmError::NoPowerButton)?;
        button.press().map_err(VmmError::Host)
    }

    /// The machine, if there is one.
    pub fn machine(&self) -> Option<Arc<Machine>> {
        self.lock().life.machine().ok()
    }

    /// Readable once the monitor should end; then [`Controller::exit_reason`] says why.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// Why the monitor should end.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.lock().life.exit_reason()
    }

    /// Ends the monitor, and a migration with it, whatever is lost by that.
    pub fn end(&self, reason: ExitReason) {
        // With force there is nothing that is refused.
        let _ = self.end_with(reason, true);
    }

    fn end_with(&self, reason: ExitReason, force: bool) -> Result<(), VmmError> {
        let migration = self.lock().life.ends(reason, force)?;
        if let Some(migration) = migration {
            migration.cancel();
        }
        self.end_if_due();
        Ok(())
    }

    /// Once the last who is to hear of it has heard.
    fn end_if_due(&self) {
        let state = self.lock();
        if state.answering == 0 && state.life.exit_reason().is_some() {
            // The counter would have to be at its limit for this to fail, and then the event is set.
            let _ = self.ended.write(1);
        }
    }

    /// Has the monitor stay until whoever asked this has been answered.
    pub(super) fn answering(&self, request: &Request) -> Option<Answering<'_>> {
        let is_last = matches!(request, Request::Quit { .. } | Request::Migrate(_) | Request::WaitMigration { .. });
        is_last.then(|| {
            self.lock().answering += 1;
            Answering(self)
        })
    }

    /// Does what a request asks that is answered at once: all but a migration that is to be waited for, which is in
    /// [`Controller::watched`].
    ///
    /// # Errors
    /// Why it was not done.
    pub(super) fn handle(&self, request: &Request) -> Result<Answer, VmmError> {
        match request {
            Request::Status {} => Ok(Answer::Status(self.status())),
            Request::Pause {} => self.pause().map(|()| Answer::Done),
            Request::Resume { force } => self.resume(*force).map(|()| Answer::Done),
            Request::PowerButton {} => self.press_power_button().map(|()| Answer::Done),
            Request::Quit { force } => self.end_with(ExitReason::Quit, *force).map(|()| Answer::Done),
            Request::Pages { cells, from_agent } => {
                memory::pages(self.any_machine()?.as_ref(), *cells, *from_agent).map(Answer::Pages)
            }
            Request::Metrics {} => memory::metrics(self.any_machine()?.as_ref(), &self.status()).map(Answer::Metrics),
            Request::PageOut { ranges } => {
                memory::page_out(self.any_machine()?.as_ref(), ranges.as_deref()).map(Answer::PageOut)
            }
            Request::Balloon { size } => memory::balloon(self.any_machine()?.as_ref(), *size).map(Answer::Balloon),
            Request::Migrate(_) | Request::Migration {} | Request::WaitMigration { .. } => {
                self.last(None).map(|migration| Answer::Migration(Box::new(migration.status())))
            }
            Request::CancelMigration {} => self.cancel_migration().map(|()| Answer::Done),
            Request::Dump { to } => {
                let (machine, post_copy) = {
                    let state = self.lock();
                    (state.life.machine()?, state.life.coming().cloned())
                };
                let missing = post_copy.map(|post_copy| post_copy.missing()).unwrap_or_default();
                Ok(Answer::Dump(dump::write(&machine, &missing, to)?))
            }
            Request::Reconnect { to, listen } => {
                self.reconnect(to.as_deref(), listen.as_deref()).map(|()| Answer::Done)
            }
        }
    }

    /// The migration that a request starts or waits for and whose end is its answer, and how much of its progress the
    /// client need not be shown.
    ///
    /// # Errors
    /// When it cannot be started, or there is none.
    pub(super) fn watched(self: &Arc<Self>, request: &Request) -> Result<Option<(Arc<Migration>, u64)>, VmmError> {
        match request {
            Request::Migrate(request) => {
                let migration = self.migrate(request)?;
                Ok((!request.detach).then_some((migration, 0)))
            }
            Request::WaitMigration { id } => {
                self.last(*id).map(|migration| Some((Arc::clone(&migration), migration.now())))
            }
            _ => Ok(None),
        }
    }

    fn any_machine(&self) -> Result<Arc<Machine>, VmmError> {
        self.lock().life.machine()
    }

    fn last(&self, id: Option<u64>) -> Result<Arc<Migration>, VmmError> {
        let last = self.lock().last.clone();
        last.filter(|migration| id.is_none_or(|id| id == migration.id)).ok_or(VmmError::NoMigration)
    }

    fn cancel_migration(&self) -> Result<(), VmmError> {
        let state = self.lock();
        let migration = state.life.migration().ok_or(VmmError::NotMigrating)?;
        match state.life.only_here() {
            0 => migration.cancel(),
            left => return Err(VmmError::OnlyHere(left)),
        }
        Ok(())
    }

    /// Goes on with a migration whose connection is gone, from either side.
    fn reconnect(&self, to: Option<&str>, listen: Option<&str>) -> Result<(), VmmError> {
        let (post_copy_source, post_copy) = {
            let state = self.lock();
            let post_copy_source = state.life.migration().and_then(|migration| migration.post_copy_source());
            (post_copy_source, state.life.coming().cloned())
        };
        if post_copy_source.is_none() && post_copy.is_none() {
            return Err(VmmError::NothingFollows);
        }
        let channels = || match (&post_copy_source, &post_copy) {
            (Some(post_copy_source), _) => Some(&post_copy_source.channels),
            (_, post_copy) => post_copy.as_ref().map(|post_copy| post_copy.channels().as_ref()),
        };
        match (to, listen) {
            (Some(to), None) => {
                let address: Address = to.parse()?;
                if let Some(channels) = channels() {
                    channels.connect(&address, &[Channel::Bulk, Channel::Faults]).map_err(VmmError::Join)?;
                }
                if let Some(post_copy_source) = &post_copy_source {
                    post_copy_source.set_address(address);
                }
                Ok(())
            }
            (None, Some(listen)) => {
                let listener = Listener::bind(&listen.parse()?)?;
                let (post_copy_source, post_copy) = (post_copy_source.clone(), post_copy.clone());
                let spawned = host::thread("reconnect").map_err(VmmError::Host)?.spawn(move || {
                    match (post_copy_source, post_copy) {
                        (Some(post_copy_source), _) => post_copy_source.channels.serve(&listener),
                        (_, Some(post_copy)) => post_copy.channels().serve(&listener),
                        _ => {}
                    }
                });
                spawned.map(drop).map_err(VmmError::Host)
            }
            _ => Err(VmmError::NoWay),
        }
    }

    /// Starts a migration, in a thread of its own.
    fn migrate(self: &Arc<Self>, request: &MigrateRequest) -> Result<Arc<Migration>, VmmError> {
        let address: Address = request.to.parse()?;
        let options = Options::from(request);
        let post_copy_source = match options.follows() {
            true => Some(Arc::new(PostCopyControl::new(
                Channels::new(MigrationId::new().map_err(VmmError::Host)?),
                Some(address.clone()),
            ))),
            false => None,
        };
        let id = self.migrations.fetch_add(1, Ordering::Relaxed) + 1;
        let migration = Arc::new(Migration::new(id, address, request.stay, post_copy_source));
        let machine = {
            let mut state = self.lock();
            let machine = state.life.is_sent(Arc::clone(&migration))?;
            state.last = Some(Arc::clone(&migration));
            machine
        };
        let (controller, its) = (Arc::clone(self), Arc::clone(&migration));
        let run = move || controller.run(&its, &machine, &options);
        if let Err(e) = host::thread("migration").and_then(|thread| thread.spawn(run)) {
            self.conclude(&migration, MigrationEnd::Stays, Err(VmmError::Host(e).into()));
        }
        Ok(migration)
    }

    fn run(&self, migration: &Arc<Migration>, machine: &Arc<Machine>, options: &Options) {
        // Migration looks for itself, and needs the CPU.
        let aside = machine.ram_watch().map(RamWatch::suspend);
        let Handles { cancel, post_copy_source } = migration.handles().unwrap_or_default();
        let mut observer = |progress: &Progress| migration.show(progress);
        let result = Link::connect(&migration.to).map_err(SourceError::from).and_then(|link| {
            source::migrate(machine.as_ref(), link, options, post_copy_source.as_ref(), &cancel, &mut observer)
        });
        drop((aside, cancel, post_copy_source));
        let end = match &result {
            Ok(report) => MigrationEnd::Moved { given_back: report.post_copy.is_some(), stay: migration.stay },
            Err(SourceError::Unconfirmed(_)) => MigrationEnd::Unconfirmed,
            Err(_) => MigrationEnd::Stays,
        };
        if let Err(e) = &result {
            tracing::info!(id = migration.id, "the migration has ended: {e}");
        }
        self.conclude(migration, end, result.as_ref().map_err(Failure::from).cloned());
    }

    /// What a migration has come to: first for the machine, then for whoever watches.
    fn conclude(&self, migration: &Migration, end: MigrationEnd, outcome: Result<Report, Failure>) {
        self.lock().life.migration_ends(end);
        migration.end(outcome);
        self.end_if_due();
    }

    fn status(&self) -> Status {
        let state = self.lock();
        let machine = state.life.machine().ok();
        let machine_state = || match &machine {
            None => RunState::Waiting,
            Some(machine) if machine.is_running() => RunState::Running,
            Some(_) => RunState::Paused,
        };
        let run_state = match &state.life {
            Life::HandedOver { .. } | Life::Gone { reason: ExitReason::Migrated, .. } => RunState::HandedOver,
            Life::Migrating { .. } if state.life.only_here() > 0 => RunState::PostCopy,
            Life::Migrating { .. } => RunState::Migrating,
            Life::Waiting | Life::Here { .. } | Life::Gone { .. } => machine_state(),
        };
        let post_copy_source = state.life.migration().and_then(|migration| migration.post_copy_source());
        Status {
            state: run_state,
            memory: ByteSize(machine.as_ref().map_or(0, |m| m.ram().layout().bytes())),
            cpus: machine.as_ref().map_or(0, |m| m.cpus()),
            pid: std::process::id(),
            agent: machine.as_ref().and_then(|machine| machine.ram_watch()).map(AgentStatus::of),
            post_copy: state.life.coming().map(|post_copy| post_copy.status()),
            post_copy_source: post_copy_source.map(|post_copy_source| PostCopySourceStatus {
                left: post_copy_source.left(),
                connected: post_copy_source.is_connected(),
                to: post_copy_source.address().map(|address| address.to_string()),
            }),
        }
    }

    fn pause(&self) -> Result<(), VmmError> {
        let machine = self.lock().life.at_rest()?;
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
        let mut state = self.lock();
        if let Some(machine) = state.life.handed_over().filter(|_| force) {
            machine.hand_over(Handover::Claim).map_err(VmmError::HadElsewhere)?;
        }
        let machine = if force { state.life.is_taken_back()? } else { state.life.at_rest()? };
        machine.resume();
        Ok(())
    }

    /// Whoever knows that the destination does not run the guest need not wait for its word: all of the guest is here.
    fn give_up_unconfirmed(&self) {
        let Some(migration) = self.lock().life.migration().cloned() else { return };
        let post_copy_source = migration.post_copy_source();
        if let Some(post_copy_source) =
            post_copy_source.filter(|post_copy_source| post_copy_source.left() > 0 && !post_copy_source.is_confirmed())
        {
            post_copy_source.channels.close();
            migration.wait(GIVEN_UP_BY_THEN);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_once_whoever_asked_has_been_answered() {
        let controller = Arc::new(Controller::new(None).unwrap());
        let quit = Request::Quit { force: false };
        let (first, second) = (controller.answering(&quit), controller.answering(&quit));
        assert!(first.is_some());
        controller.handle(&quit).unwrap();
        controller.handle(&quit).unwrap();
        assert_eq!(controller.exit_reason(), Some(ExitReason::Quit));
        drop(first);
        assert!(controller.ended().read().is_err(), "it ends before the second has its answer");
        drop(second);
        controller.ended().read().unwrap();
    }

    #[test]
    fn whoever_only_looks_does_not_keep_it() {
        let controller = Arc::new(Controller::new(None).unwrap());
        assert!(controller.answering(&Request::Status {}).is_none());
        controller.end(ExitReason::Quit);
        controller.ended().read().unwrap();
    }

    #[test]
    fn without_a_guest_nothing_is_migrated() {
        let controller = Arc::new(Controller::new(None).unwrap());
        let request: Request = serde_json::from_str(r#"{"command":"migrate","to":"unix:/nowhere"}"#).unwrap();
        assert!(matches!(controller.watched(&request), Err(VmmError::NoGuest)));
        assert!(matches!(controller.handle(&Request::Migration {}), Err(VmmError::NoMigration)));
        assert!(matches!(controller.handle(&Request::CancelMigration {}), Err(VmmError::NotMigrating)));
    }
}
