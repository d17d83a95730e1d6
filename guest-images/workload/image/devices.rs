//! All devices that were asked for: found at boot, given their turns, told about with each report.

use core::fmt;

use crate::arena::Arena;
use crate::bars::Window;
use crate::clock::Clock;
use crate::command::Command;
use crate::console::Console;
use crate::device_report::Devices as Found;
use crate::extents::Extent;
use crate::layout::Layout;
use crate::options::Options;
use crate::tsc::Frequency;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Disk;
use crate::virtio::net::Net;
use crate::virtio::random::Source;
use crate::virtio::transport::DeviceError;
use crate::virtio::{Patience, Setting, hostile};

/// The devices, driven by the first vCPU.
pub struct Devices {
    setting: Setting,
    disk: Option<Disk>,
    net: Option<Net>,
    balloon: Option<Balloon>,
    source: Option<Source>,
    /// Bad blocks that were told.
    told: usize,
}

/// What devices want of the vCPU's time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Nothing is under way.
    Rest,
    /// Something is, and an interrupt will tell.
    Interrupt,
    /// Something is, and has to be looked for.
    Polling,
}

impl Devices {
    /// None, or those that the options name.
    pub fn find(options: &Options, layout: &Layout, ram: &[Extent], frequency: Frequency) -> Result<Self, DeviceError> {
        let setting = Setting { frequency, seed: options.seed, interrupts: options.interrupts };
        let mut devices = Self { setting, disk: None, net: None, balloon: None, source: None, told: 0 };
        if !options.devices() {
            return Ok(devices);
        }
        let (mut arena, mut window) = (Arena::new(&layout.devices), Window::new(ram).map_err(DeviceError::Bars)?);
        let (arena, window) = (&mut arena, &mut window);
        if options.disk > 0 {
            devices.disk = Some(Disk::find(setting, options.disk, window, arena)?);
        }
        if options.net {
            devices.net = Some(Net::find(setting, window, arena)?);
        }
        if options.free > 0 {
            devices.balloon = Some(Balloon::find(setting, layout.free, window, arena)?);
        }
        if options.random {
            devices.source = Some(Source::find(setting, window, arena)?);
        }
        Ok(devices)
    }

    /// What was found.
    pub fn found(&self, layout: &Layout) -> Found {
        let mac = self.net.as_ref().map_or(0, |net| net.mac.iter().fold(0, |mac, byte| mac << 8 | u64::from(*byte)));
        Found {
            disk_blocks: self.disk.as_ref().map_or(0, |disk| disk.capacity),
            disk_used: self.disk.as_ref().map_or(0, |disk| disk.used),
            net_mac: mac,
            balloon: self.balloon.as_ref().map_or(0, |balloon| 1 + u32::from(balloon.reports())),
            random: u32::from(self.source.is_some()),
            free: layout.free,
            interrupts: u32::from(self.setting.interrupts),
        }
    }

    /// Whether a job wants the console left alone.
    #[inline]
    pub fn want_quiet(&self) -> bool {
        self.disk.as_ref().is_some_and(Disk::wants_quiet) || self.net.as_ref().is_some_and(Net::wants_quiet)
    }

    /// Gives each its turn.
    #[inline]
    pub fn step(&mut self, console: &mut Console, clock: &mut Clock) {
        if let Some(done) = self.disk.as_mut().and_then(Disk::step) {
            console.say(&done, clock);
        }
        if let Some(done) = self.net.as_mut().and_then(Net::step) {
            console.say(&done, clock);
        }
    }

    /// What they want.
    #[inline]
    pub fn wish(&self) -> Wish {
        let is_busy = self.disk.as_ref().is_some_and(Disk::is_busy) || self.net.as_ref().is_some_and(Net::is_busy);
        match (is_busy, self.setting.interrupts) {
            (false, _) => Wish::Rest,
            (true, true) => Wish::Interrupt,
            (true, false) => Wish::Polling,
        }
    }

    /// Asks for interrupts; whether something is done already.
    pub fn want_interrupt(&mut self) -> bool {
        let disk = self.disk.as_mut().is_some_and(|disk| disk.queue.want_interrupt());
        let net = self.net.as_mut().is_some_and(Net::want_interrupt);
        disk | net
    }

    /// What goes with each report; what finds no room is told with a later one.
    pub fn report(&mut self, console: &mut Console) {
        if let Some(disk) = &self.disk {
            while let Some(bad) = disk.bad(self.told) {
                if !console.offer(&bad) {
                    return;
                }
                self.told += 1;
            }
            console.offer(&disk.counts());
        }
        if let Some(net) = &mut self.net {
            // An interrupt says so at once, where there are some.
            net.announce();
            console.offer(&net.counts());
        }
    }

    /// Does what a command asks for.
    pub fn obey(&mut self, command: Command, console: &mut Console, clock: &mut Clock) {
        let is_done = match command {
            Command::Disk(job) => self.disk.as_mut().map(|disk| disk.begin(job)).is_some(),
            Command::DiskStop => self.disk.as_mut().map(Disk::stop).is_some(),
            Command::DiskFlush => self.disk.as_mut().is_some_and(Disk::flush),
            Command::DiskDiscard(first, count) => self.disk.as_mut().is_some_and(|disk| disk.discard(first, count)),
            Command::DiskZero(first, count) => self.disk.as_mut().is_some_and(|disk| disk.zero(first, count)),
            Command::Net(job) => self.net.as_mut().map(|net| net.begin(job)).is_some(),
            Command::NetStop => self.net.as_mut().map(Net::stop).is_some(),
            _ => self.answer(command, console, clock),
        };
        if !is_done {
            console.refuse(&Impossible, clock);
        }
    }

    /// Obeys a command that is answered before anything else is done.
    fn answer(&mut self, command: Command, console: &mut Console, clock: &mut Clock) -> bool {
        let mut patience = Patience { console, clock };
        let patience = &mut patience;
        let answer: Option<&dyn fmt::Display> = match (command, &mut self.balloon, &mut self.source, &mut self.disk) {
            (Command::FreeFill, Some(balloon), ..) => Some(&balloon.fill(patience)),
            (Command::FreeReport, Some(balloon), ..) => Some(&balloon.report(patience)),
            (Command::FreeCheck, Some(balloon), ..) => Some(&balloon.check(patience)),
            (Command::Balloon(pages), Some(balloon), ..) => Some(&balloon.set(pages, patience)),
            (Command::Random(bytes), _, Some(source), _) => Some(&source.read(bytes, patience)),
            (Command::Hostile(case), .., Some(disk)) if !disk.is_busy() => {
                Some(&hostile::attack(disk, case, self.setting.frequency, patience))
            }
            _ => None,
        };
        answer.map(|answer| console.say(answer, clock)).is_some()
    }
}

/// A command for a device that is not there, cannot do it, or is busy.
struct Impossible;

impl fmt::Display for Impossible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the device for this command is not there (see options disk, net, free, random), is busy or cannot do it",
        )
    }
}
