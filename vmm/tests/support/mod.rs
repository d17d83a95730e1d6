//! A machine without KVM.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]
#![allow(dead_code, reason = "each test file uses what it needs")]

#[allow(dead_code, reason = "each test file uses what it needs")]
pub(crate) mod post_copy;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use thermocline::arch::x86_64::Processor;
use thermocline::devices::legacy::serial::SavedSerial;
use thermocline::machine::{MachineError, MachineSpec, MachineState};
use thermocline::migration::destination::{Arrival, DestinationError, PostCopy, Reception, Terms};
use thermocline::migration::link::Listener;
use thermocline::migration::wire::{Offer, Refusal};
use thermocline::migration::{Belief, DestinationMachine, SourceMachine};
use thermocline::ram::{GuestRam, MissingPages, MissingRam, PageSet, RamError, ReadPages};
use thermocline::record::{Record, Records};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const PAGES: u64 = 512;
pub(crate) const PAGE: usize = 4096;

/// A machine whose guest is whoever calls [`Fake::execute`].
pub(crate) struct Fake {
    pub(crate) ram: Arc<GuestRam>,
    running: AtomicBool,
    /// Held by the guest while it writes, so that a pause is a pause.
    pub(crate) executing: Mutex<()>,
    pub(crate) state: Mutex<Option<MachineState>>,
    /// What somebody says of its memory, who need not know.
    pub(crate) believed: Mutex<Option<Belief>>,
    pub(crate) hooks: Mutex<Hooks>,
}

type OnMachine = Box<dyn FnOnce(&Fake) + Send>;

/// What happens besides.
#[derive(Default)]
pub(crate) struct Hooks {
    /// Takes the place of what lands pages and fills holes.
    pub(crate) missing: Option<Arc<dyn MissingPages>>,
    /// Takes the place of what reads pages.
    pub(crate) reader: Option<Arc<dyn ReadPages>>,
    /// While the machine is restored.
    pub(crate) restoring: Option<OnMachine>,
    /// When the guest is let go at the destination.
    pub(crate) resuming: Option<OnMachine>,
}

impl Fake {
    pub(crate) fn new() -> Self {
        let ram = Arc::new(GuestRam::new(PAGES * PAGE as u64).unwrap());
        Self {
            ram,
            running: AtomicBool::new(false),
            executing: Mutex::default(),
            state: Mutex::default(),
            believed: Mutex::default(),
            hooks: Mutex::default(),
        }
    }

    pub(crate) fn write(&self, page: u64, value: u8) {
        self.ram.memory().write_slice(&[value; PAGE], GuestAddress(page * PAGE as u64)).unwrap();
    }

    /// What the guest does: writes `value` to `page` if it may run.
    pub(crate) fn execute(&self, page: u64, value: u8) -> bool {
        let _executing = self.executing.lock().unwrap();
        let running = self.running.load(Ordering::SeqCst);
        if running {
            self.write(page, value);
        }
        running
    }

    pub(crate) fn runs(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; PAGES as usize * PAGE];
        self.ram.read_pages(self.ram.all_pages(), &mut bytes).unwrap();
        bytes
    }
}

impl SourceMachine for Fake {
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
    fn believed(&self) -> Option<Belief> {
        self.believed.lock().unwrap().clone()
    }
    fn page_reader(&self) -> Arc<dyn ReadPages> {
        let reader = self.hooks.lock().unwrap().reader.take();
        reader.unwrap_or_else(|| Arc::<GuestRam>::clone(&self.ram))
    }
    fn describe(&self) -> MachineSpec {
        MachineSpec {
            ram: self.ram.layout().clone(),
            cpus: 1,
            processor: Processor { cpuid: Vec::new(), features: Vec::new(), tsc_khz: 1 },
            devices: Vec::new(),
        }
    }
    fn start_dirty_log(&self) -> Result<(), MachineError> {
        self.ram.take_own_writes();
        Ok(())
    }
    fn take_dirty_log(&self) -> Result<PageSet, MachineError> {
        Ok(self.ram.take_own_writes())
    }
    fn stop_dirty_log(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn pause(&self) -> Result<(), MachineError> {
        let _executing = self.executing.lock().unwrap();
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn resume(&self) {
        self.running.store(true, Ordering::SeqCst);
    }
    fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }
    fn save(&self) -> Result<MachineState, MachineError> {
        let serial = SavedSerial { received: b"typed".to_vec(), ..SavedSerial::default() };
        Ok(MachineState { running: false, records: Records(vec![Record::of("serial0", &serial)?]) })
    }
}

impl DestinationMachine for Fake {
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
    fn restore(&self, state: &MachineState) -> Result<(), MachineError> {
        *self.state.lock().unwrap() = Some(state.clone());
        let hook = self.hooks.lock().unwrap().restoring.take();
        hook.into_iter().for_each(|hook| hook(self));
        Ok(())
    }
    fn missing_pages(&self) -> Result<Arc<dyn MissingPages>, RamError> {
        match self.hooks.lock().unwrap().missing.take() {
            Some(missing) => Ok(missing),
            None => Ok(Arc::new(MissingRam::new(Arc::clone(&self.ram))?)),
        }
    }
    fn resume(&self) {
        let hook = self.hooks.lock().unwrap().resuming.take();
        hook.into_iter().for_each(|hook| hook(self));
        self.running.store(true, Ordering::SeqCst);
    }
    fn pause(&self) -> Result<(), MachineError> {
        SourceMachine::pause(self)
    }
    fn try_pause(&self) -> bool {
        self.running.store(false, Ordering::SeqCst);
        self.executing.try_lock().is_ok()
    }
    fn is_running(&self) -> bool {
        self.runs()
    }
}

/// A destination that listens, and what becomes of its guest.
pub(crate) struct Receiving {
    pub(crate) reception: Reception<Arc<Fake>>,
    arrivals: Receiver<Arrival<Arc<Fake>>>,
}

/// Listens for a guest, whose machine `prepare` makes.
pub(crate) fn receive(
    listener: Listener,
    once: bool,
    prepare: impl Fn(&Offer) -> Result<Arc<Fake>, Refusal> + Send + Sync + 'static,
) -> Receiving {
    receive_with(listener, Terms { source_timeout: Duration::from_secs(20), once }, prepare)
}

/// The same on other terms.
pub(crate) fn receive_with(
    listener: Listener,
    terms: Terms,
    prepare: impl Fn(&Offer) -> Result<Arc<Fake>, Refusal> + Send + Sync + 'static,
) -> Receiving {
    let (sender, arrivals) = channel();
    // Whoever waits for the news may have heard enough.
    let reception = Reception::open(listener, terms, prepare, move |arrival| drop(sender.send(arrival))).unwrap();
    Receiving { reception, arrivals }
}

impl Receiving {
    /// Waits until a guest runs here, and gives what is still to come.
    pub(crate) fn runs(&self) -> Option<Arc<PostCopy>> {
        match self.arrivals.recv().unwrap() {
            Arrival::Running(_, post_copy) => post_copy,
            Arrival::Whole | Arrival::Failed(_) => panic!("it does not run"),
        }
    }

    /// Waits until a guest is here, whole, or will not come.
    pub(crate) fn arrives(&self) -> Result<(), DestinationError> {
        loop {
            match self.arrivals.recv().unwrap() {
                Arrival::Running(..) => {}
                Arrival::Whole => return Ok(()),
                Arrival::Failed(e) => return Err(e),
            }
        }
    }
}
