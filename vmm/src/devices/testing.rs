//! A VM for tests of devices, which writes down what they ask of it.
#![cfg_attr(not(test), allow(dead_code, reason = "fuzzing looks at nothing of it"))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::host::{Backends, Host, Interrupts, IoEvents, Message, MessageInterrupts};
use crate::ram::GuestRam;

/// RAM of a machine that nobody runs.
const RAM: u64 = 2 << 20;

/// Interrupts that go nowhere, and writes that nobody does.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeVm {
    sent: Arc<Mutex<Vec<u32>>>,
    routings: Arc<Mutex<usize>>,
    io_events: Arc<Mutex<Vec<u64>>>,
}

impl FakeVm {
    /// What a device of such a VM is made with.
    pub(crate) fn host() -> Host {
        Self::default().make_host(&Arc::new(GuestRam::new(RAM).unwrap()))
    }

    /// What a device of this VM with this RAM is made with.
    pub(crate) fn make_host(&self, ram: &Arc<GuestRam>) -> Host {
        Host::new(Arc::new(self.clone()), Arc::clone(ram), &Backends::default())
    }

    /// The data of the messages that were sent, in order.
    pub(crate) fn sent(&self) -> Vec<u32> {
        self.sent.lock().unwrap().clone()
    }

    /// How often the table of routes was changed.
    pub(crate) fn routings(&self) -> usize {
        *self.routings.lock().unwrap()
    }

    /// The addresses of which writes set events, in order.
    pub(crate) fn io_events(&self) -> Vec<u64> {
        let mut addresses = self.io_events.lock().unwrap().clone();
        addresses.sort_unstable();
        addresses
    }
}

impl Interrupts for FakeVm {
    fn line(&self, _: u32) -> io::Result<EventFd> {
        EventFd::new(libc::EFD_NONBLOCK)
    }

    fn messages(&self, count: u16) -> io::Result<Arc<dyn MessageInterrupts>> {
        Ok(Arc::new(FakeMessages { vm: self.clone(), routes: Mutex::new(vec![None; count.into()]) }))
    }
}

impl IoEvents for FakeVm {
    fn add(&self, address: u64, _: &EventFd) -> io::Result<()> {
        let mut events = self.io_events.lock().unwrap();
        if events.contains(&address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        events.push(address);
        Ok(())
    }

    fn remove(&self, address: u64, _: &EventFd) -> io::Result<()> {
        let mut events = self.io_events.lock().unwrap();
        let place = events.iter().position(|other| *other == address).ok_or(io::ErrorKind::NotFound)?;
        events.remove(place);
        Ok(())
    }
}

#[derive(Debug)]
struct FakeMessages {
    vm: FakeVm,
    routes: Mutex<Vec<Option<Message>>>,
}

impl MessageInterrupts for FakeMessages {
    fn route(&self, messages: &[(u16, Message)]) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap();
        let mut has_changed = false;
        for (interrupt, message) in messages {
            let route = routes.get_mut(usize::from(*interrupt)).ok_or(io::ErrorKind::NotFound)?;
            has_changed |= route.replace(*message) != Some(*message);
        }
        *self.vm.routings.lock().unwrap() += usize::from(has_changed);
        Ok(())
    }

    fn trigger(&self, interrupt: u16) -> io::Result<()> {
        let message = self.routes.lock().unwrap().get(usize::from(interrupt)).copied().flatten();
        self.vm.sent.lock().unwrap().extend(message.map(|message| message.data));
        Ok(())
    }
}
