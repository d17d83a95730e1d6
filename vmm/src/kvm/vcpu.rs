//! vCPUs: a thread each, which can be stopped at an instruction boundary and looked at.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::registers::{new_features, offer_features, restore, save, write_msrs};
use super::{KvmError, Vm, convert, model_cpuid, time};
use crate::arch::x86_64::Processor;
use crate::arch::x86_64::cpuid::{self, CpuModel};
use crate::arch::x86_64::state::{Time, VcpuState};
use crate::devices::{Bus, StopReason};

/// How long to wait for a vCPU that was kicked before it is kicked again: a signal that arrives just before `KVM_RUN`
/// has no effect.
const KICK_AGAIN: Duration = Duration::from_micros(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Pause,
    Run,
    StopNotice,
}

/// What a vCPU thread and those who command it share.
struct Shared {
    index: u8,
    vm: Vm,
    bus: Bus,
    order: Mutex<Order>,
    ordered: Condvar,
    /// Held by the thread while the vCPU runs.
    fd: Mutex<VcpuFd>,
    end: Arc<StopNotice>,
    /// How often one of all vCPUs has begun to run, or gone on.
    entries: Arc<AtomicU64>,
}

/// Where the first vCPU that ends leaves the reason.
#[derive(Debug)]
pub struct StopNotice {
    reason: Mutex<Option<StopReason>>,
    event: EventFd,
}

impl StopNotice {
    fn new() -> Result<Self, KvmError> {
        let event = EventFd::new(libc::EFD_NONBLOCK).map_err(KvmError::EventFd)?;
        Ok(Self { reason: Mutex::new(None), event })
    }

    fn report(&self, reason: StopReason) {
        locked(&self.reason).get_or_insert(reason);
        // The counter would have to be at its limit for this to fail, and then the event is set.
        let _ = self.event.write(1);
    }

    /// Another reason counts from now on.
    pub(crate) fn replace(&self, reason: StopReason) {
        self.forget();
        self.report(reason);
    }

    /// The guest is started anew: nothing has happened yet.
    fn forget(&self) {
        *locked(&self.reason) = None;
    }

    /// Readable once the guest has stopped by itself.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Why it stopped, or `None` while it has not.
    pub fn reason(&self) -> Option<StopReason> {
        locked(&self.reason).clone()
    }
}

/// What vCPUs are to be.
#[derive(Clone, Copy, Debug)]
pub enum Told<'p> {
    /// A processor of this model, as this host can make one.
    Model(CpuModel),
    /// What their guest has been told before.
    Before(&'p Processor),
}

impl Told<'_> {
    /// The processor, as far as it is known before there is a vCPU.
    fn processor(self, vm: &Vm) -> Result<Processor, KvmError> {
        match self {
            Self::Before(processor) => Ok(processor.clone()),
            Self::Model(model) => {
                let cpuid = model_cpuid(vm.kvm(), model, vm.ram().layout())?;
                Ok(Processor { features: new_features(vm, &cpuid)?, cpuid, tsc_khz: 0 })
            }
        }
    }
}

/// All vCPUs of a machine. They start paused.
pub struct Vcpus {
    vcpus: Vec<(Arc<Shared>, Option<JoinHandle<()>>)>,
    processor: Processor,
    end: Arc<StopNotice>,
    entries: Arc<AtomicU64>,
    /// What each was when it was made: what a reset makes of it.
    at_power_on: Vec<VcpuState>,
}

impl std::fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vcpus({})", self.vcpus.len())
    }
}

/// A lock whose holder panicked still guards data that is whole: every update here is one assignment.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Makes `count` vCPUs with their threads, paused, each told what it is.
    ///
    /// What they were told is kept here: a vCPU that runs cannot be asked, and `KVM_GET_CPUID2` may give back what the
    /// hardware has rather than what was set (KVM without hardware virtualization, PVM, does).
    ///
    /// # Errors
    /// When KVM or the host refuses, or the host cannot be this processor.
    pub fn new(vm: &Vm, bus: &Bus, count: u8, told: Told<'_>) -> Result<Self, KvmError> {
        register_signal_handler(SIGRTMIN(), kicked)
            .map_err(|e| KvmError::EventFd(io::Error::from_raw_os_error(e.errno())))?;
        let Processor { cpuid: told_cpuid, features, tsc_khz } = told.processor(vm)?;
        let end = Arc::new(StopNotice::new()?);
        let processor = Processor { cpuid: cpuid::for_vcpu(&told_cpuid, 0, count), features, tsc_khz };
        let mut all = Self { vcpus: Vec::new(), processor, end, entries: Arc::default(), at_power_on: Vec::new() };
        for index in 0..count {
            let fd = vm.fd().create_vcpu(u64::from(index)).map_err(KvmError::call("KVM_CREATE_VCPU"))?;
            // As the host runs, which is what it does anyway. Without it, where the host's own measurement of its frequency has
            // not been confirmed, KVM takes a vCPU's deadlines for ones of another frequency, and they never come (seen on
            // 6.12, nested, with a host under load).
            let _ = fd.set_tsc_khz(0);
            let cpuid = cpuid::for_vcpu(&told_cpuid, index, count);
            fd.set_cpuid2(&convert::cpuid_to_kvm(&cpuid)?).map_err(KvmError::call("KVM_SET_CPUID2"))?;
            // Written back as it is: until then an INIT for a vCPU other than the first is lost (seen on Linux 6.18 with
            // PVM; QEMU writes the local APIC of every vCPU too).
            let lapic = fd.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?;
            fd.set_lapic(&lapic).map_err(KvmError::call("KVM_SET_LAPIC"))?;
            match (index, told) {
                (0, Told::Model(_)) => all.processor.features = offer_features(&fd, &all.processor.features)?,
                _ => write_msrs(&fd, &all.processor.features)?,
            }
            let tsc_khz = if let Told::Before(processor) = told { Some(processor.tsc_khz) } else { None };
            all.processor.tsc_khz = time::set_frequency(vm, &fd, tsc_khz)?;
            all.at_power_on.push(save(vm, &fd)?);
            let shared = Arc::new(Shared {
                index,
                vm: vm.clone(),
                bus: bus.clone(),
                order: Mutex::new(Order::Pause),
                ordered: Condvar::new(),
                fd: Mutex::new(fd),
                end: Arc::clone(&all.end),
                entries: Arc::clone(&all.entries),
            });
            let thread = Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(256 << 10)
                .spawn({
                    let shared = Arc::clone(&shared);
                    move || shared.run()
                })
                .map_err(|cause| KvmError::Thread { index, cause })?;
            all.vcpus.push((shared, Some(thread)));
        }
        Ok(all)
    }

    /// Where the guest's own end is reported.
    pub fn end(&self) -> &Arc<StopNotice> {
        &self.end
    }

    /// How often one of them has begun to run, or gone on.
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::SeqCst)
    }

    /// Number of vCPUs.
    pub fn len(&self) -> usize {
        self.vcpus.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.vcpus.is_empty()
    }

    /// What they have been told of their processor.
    pub fn processor(&self) -> &Processor {
        &self.processor
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        for (vcpu, _) in &self.vcpus {
            *locked(&vcpu.order) = Order::Run;
            vcpu.ordered.notify_all();
        }
    }

    /// Stops all vCPUs at an instruction boundary with no I/O left half done; returns when they are paused.
    ///
    /// # Errors
    /// When one has not stopped after `limit`. It does when it can; the others are paused.
    pub fn pause(&self, limit: Duration) -> Result<(), KvmError> {
        let deadline = Instant::now() + limit;
        match self.order_all(Order::Pause, Some(deadline)) {
            Some(index) => Err(KvmError::RunsOn { index, limit }),
            None => Ok(()),
        }
    }

    /// Asks all vCPUs to stop, and waits for none; whether all are paused. One that KVM works for with a page that is not there does
    /// so only once it is.
    pub fn try_pause(&self) -> bool {
        self.order(Order::Pause);
        self.vcpus.iter().filter(|(vcpu, thread)| !vcpu.kick(thread.as_ref())).count() == 0
    }

    /// Works on a paused vCPU's file.
    pub(crate) fn with_fd<T>(
        &self,
        index: usize,
        work: impl FnOnce(&VcpuFd) -> Result<T, KvmError>,
    ) -> Result<T, KvmError> {
        let (vcpu, _) = self.vcpus.get(index).ok_or(KvmError::VcpuGone(index as u8))?;
        work(&locked(&vcpu.fd))
    }

    /// Reads the state of all vCPUs, which are paused.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(&self) -> Result<Vec<VcpuState>, KvmError> {
        self.vcpus.iter().map(|(vcpu, _)| save(&vcpu.vm, &locked(&vcpu.fd))).collect()
    }

    /// Writes the state of all vCPUs, which are paused; one for each.
    ///
    /// # Errors
    /// When KVM refuses, or there is something in it that this host does not take.
    pub fn restore(&self, states: &[VcpuState]) -> Result<(), KvmError> {
        for ((vcpu, _), state) in self.vcpus.iter().zip(states) {
            restore(&vcpu.vm, &locked(&vcpu.fd), state)?;
        }
        Ok(())
    }

    /// Reads the machine's clocks. All vCPUs are paused.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save_time(&self, vm: &Vm) -> Result<Time, KvmError> {
        self.with_all_fds(|fds| time::save(vm, fds, self.processor.tsc_khz))
    }

    /// Has the machine's clocks go on from there. All vCPUs are paused; their state is restored after this.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore_time(&self, vm: &Vm, time: &Time) -> Result<(), KvmError> {
        self.with_all_fds(|fds| time::restore(vm, fds, self.processor.tsc_khz, time))
    }

    fn with_all_fds<T>(&self, work: impl FnOnce(&[&VcpuFd]) -> T) -> T {
        let held: Vec<_> = self.vcpus.iter().map(|(vcpu, _)| locked(&vcpu.fd)).collect();
        work(&held.iter().map(|fd| &**fd).collect::<Vec<_>>())
    }

    /// Makes all vCPUs, which are paused, what they were when they were made, but for their time, which goes on; their guest has not ended
    /// any more.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn reset(&self) -> Result<(), KvmError> {
        self.restore(&self.at_power_on)?;
        self.with_all_fds(time::align)?;
        self.end.forget();
        Ok(())
    }

    fn order(&self, order: Order) {
        for (vcpu, _) in &self.vcpus {
            *locked(&vcpu.order) = order;
            vcpu.ordered.notify_all();
        }
    }

    /// Gives all vCPUs an order that stops them, and waits until they have; gives one that had not by the deadline. None is waited for
    /// before all have been reminded: they stop together.
    fn order_all(&self, order: Order, deadline: Option<Instant>) -> Option<u8> {
        self.order(order);
        loop {
            let running = self.vcpus.iter().filter(|(vcpu, thread)| !vcpu.kick(thread.as_ref()));
            let late = running.map(|(vcpu, _)| vcpu.index).reduce(u8::min)?;
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Some(late);
            }
            std::thread::sleep(KICK_AGAIN);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.order_all(Order::StopNotice, None);
        for (_, thread) in &mut self.vcpus {
            if let Some(thread) = thread.take() {
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    /// Reminds the vCPU's thread of its order, unless it has stopped; whether it has.
    fn kick(&self, thread: Option<&JoinHandle<()>>) -> bool {
        // The thread gives the vCPU's file back when it has stopped.
        let Some(thread) = thread.filter(|thread| !thread.is_finished() && self.fd.try_lock().is_err()) else {
            return true;
        };
        let _ = thread.kill(SIGRTMIN());
        false
    }

    fn run(&self) {
        loop {
            {
                let mut order = locked(&self.order);
                while *order == Order::Pause {
                    order = self.ordered.wait(order).unwrap_or_else(PoisonError::into_inner);
                }
                if *order == Order::StopNotice {
                    return;
                }
            }
            let mut fd = locked(&self.fd);
            // Tells the guest's watchdogs that it was not the guest that did nothing meanwhile. Refused for guests without kvmclock, which
            // have no place to look for it.
            let _ = fd.kvmclock_ctrl();
            self.entries.fetch_add(1, Ordering::SeqCst);
            let ended = self.run_until_ordered(&mut fd);
            let ended_by_io = self.finish_io(&mut fd);
            // Said while the file is held: whoever finds this vCPU paused knows why it is.
            if let Some(reason) = ended.or(ended_by_io) {
                *locked(&self.order) = Order::Pause;
                self.end.report(reason);
            }
            drop(fd);
        }
    }

    /// Runs the guest until another order comes or it ends.
    fn run_until_ordered(&self, fd: &mut VcpuFd) -> Option<StopReason> {
        while *locked(&self.order) == Order::Run {
            if let Err(reason) = self.run_once(fd) {
                return Some(reason);
            }
        }
        None
    }

    /// Completes the I/O of the last exit, whose second half KVM does at the next entry (Documentation/virt/kvm/api.rst,
    /// `KVM_RUN`), without letting the guest run. An access that KVM makes in pieces exits once for each.
    fn finish_io(&self, fd: &mut VcpuFd) -> Option<StopReason> {
        fd.set_kvm_immediate_exit(1);
        let ended = loop {
            match self.run_once(fd) {
                Ok(Exit::Handled) => {}
                Ok(Exit::Interrupted) => break None,
                Err(reason) => break Some(reason),
            }
        };
        fd.set_kvm_immediate_exit(0);
        ended
    }

    /// Runs the guest until its next exit, and does what it asks for.
    fn run_once(&self, fd: &mut VcpuFd) -> Result<Exit, StopReason> {
        let ended = match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => self.bus.port_write(port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                self.bus.port_read(port, data);
                None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => self.bus.memory_write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.bus.memory_read(address, data);
                None
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Ok(Exit::Interrupted),
            Ok(VcpuExit::Shutdown) => Some(StopReason::TripleFault),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Some(StopReason::Failed(format!(
                "processor {cpu} refused to enter the guest, hardware reason {reason:#x}"
            ))),
            Ok(VcpuExit::InternalError) => {
                let rip = fd.get_regs().map_or(0, |r| r.rip);
                Some(StopReason::Failed(format!("KVM could not emulate what vCPU {} does at {rip:#x}", self.index)))
            }
            Ok(other) => Some(StopReason::Failed(format!("KVM left vCPU {} with {other:?}", self.index))),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(Exit::Interrupted),
            Err(e) => Some(StopReason::Failed(format!("KVM_RUN of vCPU {}: {e}", self.index))),
        };
        ended.map_or(Ok(Exit::Handled), Err)
    }
}

/// What came of an entry into the guest that did not end it.
enum Exit {
    /// It asked for something and has it.
    Handled,
    /// Somebody wants the vCPU back.
    Interrupted,
}
