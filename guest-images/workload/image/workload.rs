//! The first vCPU: boots the rest, then works, reports and obeys.

use core::fmt;
use core::sync::atomic::Ordering::Relaxed;

use crate::boot_info::{BootInfo, BootInfoError};
use crate::clock::Clock;
use crate::command::Command;
use crate::console::Console;
use crate::control::{FIGURES, Figures, ORDERS};
use crate::devices::{Devices, Wish};
use crate::layout::{Layout, LayoutError};
use crate::memory::Memory;
use crate::options::{Options, OptionsError};
use crate::pattern::Random;
use crate::report::{Bad, CheckedAll, Ready, Touched};
use crate::sleep::Sleeper;
use crate::smp::Machine;
use crate::tsc::Frequency;
use crate::virtio::transport::DeviceError;
use crate::worker::{Step, Worker};
use crate::{entry, power, serial, smp, traps};

/// Where ring 3 begins, on vCPU `cpu`.
#[unsafe(no_mangle)]
extern "C" fn ring3_main(cpu: u32) -> ! {
    if cpu != 0 {
        smp::second();
    }
    traps::install();
    serial::set_up();
    let frequency = Frequency::find();
    let mut clock = Clock::new(&FIGURES[0]);
    let mut console = Console::new(frequency);
    match Machine::find(frequency) {
        Ok((machine, devices)) => run(&machine, devices, console, clock),
        Err(refusal) => console.fail(&refusal, &mut clock),
    }
}

/// Why the guest does not begin.
enum Refusal {
    BootInfo(BootInfoError),
    Options(OptionsError),
    Layout(LayoutError),
    Device(DeviceError),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BootInfo(error) => error.fmt(f),
            Self::Options(error) => error.fmt(f),
            Self::Layout(error) => error.fmt(f),
            Self::Device(error) => error.fmt(f),
        }
    }
}

impl Machine {
    fn find(frequency: Frequency) -> Result<(Self, Devices), Refusal> {
        let info = BootInfo::read().map_err(Refusal::BootInfo)?;
        let options: Options = info.command_line().parse().map_err(Refusal::Options)?;
        let layout = Layout::place(&info.ram, &options).map_err(Refusal::Layout)?;
        let memory = Memory::new(layout, options.seed);
        let devices = Devices::find(&options, &layout, &info.ram, frequency).map_err(Refusal::Device)?;
        Ok((Self { options, memory, frequency }, devices))
    }
}

fn run(machine: &Machine, devices: Devices, mut console: Console, mut clock: Clock) -> ! {
    let Machine { options, memory, frequency } = *machine;
    ORDERS.rate.store(options.rate, Relaxed);
    ORDERS.writes.store(options.writes, Relaxed);
    memory.fill();
    if options.cpus == 2 && !smp::start(machine) {
        console.fail(&"the second vCPU did not start within ten seconds", &mut clock);
    }
    let sleeper = Sleeper::new(0, frequency);
    let worker = Worker::new(memory, frequency, &FIGURES[0], options.seed, 0, u64::from(options.cpus));
    let ready = Ready {
        cpus: options.cpus,
        seed: options.seed,
        working_set: memory.layout.working_set,
        cold: memory.layout.cold,
        table: memory.layout.table.into(),
        tsc_khz: frequency.khz,
        tsc_from: frequency.from,
        boot_us: frequency.us(clock.read().saturating_sub(entry::boot_tsc())),
    };
    console.say(&ready, &mut clock);
    if options.devices() {
        console.say(&devices.found(&memory.layout), &mut clock);
    }
    ORDERS.running.store(true, Relaxed);
    let random = Random::new(!options.seed);
    First { memory, frequency, console, clock, worker, sleeper, random, devices }.run()
}

/// The first vCPU at work.
struct First {
    memory: Memory,
    frequency: Frequency,
    console: Console,
    clock: Clock,
    worker: Worker,
    sleeper: Sleeper,
    /// Chooses cold pages to touch.
    random: Random,
    devices: Devices,
}

impl First {
    fn run(&mut self) -> ! {
        reset_stall();
        let mut idle = false;
        loop {
            let now = self.clock.read();
            if !self.devices.want_quiet() {
                if self.console.tell(now, &mut self.clock) {
                    self.devices.report(&mut self.console);
                }
                if let Some(command) = self.console.command(now, idle, &mut self.clock) {
                    self.obey(command);
                }
            }
            self.devices.step(&mut self.console, &mut self.clock);
            idle = matches!(self.worker.step(now), Step::Ahead);
            if idle && (!self.console.has_output() || self.devices.want_quiet()) {
                self.rest();
            }
        }
    }

    /// Passes time, unless something has to be looked for.
    fn rest(&mut self) {
        let Self { devices, sleeper, clock, frequency, .. } = self;
        let ticks = frequency.ticks(1000);
        match devices.wish() {
            Wish::Rest => sleeper.sleep(ticks, clock),
            Wish::Interrupt => sleeper.sleep_unless(ticks, clock, || devices.want_interrupt()),
            Wish::Polling => return,
        };
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Check => self.check(),
            Command::Stop => ORDERS.running.store(false, Relaxed),
            Command::Go => ORDERS.running.store(true, Relaxed),
            Command::Rate(rate) => ORDERS.rate.store(rate, Relaxed),
            Command::Writes(percent) => ORDERS.writes.store(percent, Relaxed),
            Command::ResetStall => reset_stall(),
            Command::TouchCold(count) => self.touch_cold(count),
            Command::Off => self.end(power::off),
            Command::Reset => self.end(power::reset),
            Command::Crash => self.end(power::crash),
            _ => {
                // What a job that leaves the console alone would keep back.
                self.console.flush(&mut self.clock);
                self.devices.obey(command, &mut self.console, &mut self.clock);
            }
        }
    }

    fn end(&mut self, how: fn() -> !) {
        self.console.flush(&mut self.clock);
        how()
    }

    /// Compares every page, with the other vCPU off the pages; reports go on.
    fn check(&mut self) {
        let Self { memory, console, clock, .. } = self;
        let start = clock.read();
        let (working, cold) = (memory.layout.working_set.pages(), memory.layout.cold.pages());
        let mut tell = |clock: &mut Clock| {
            let now = clock.read();
            console.tell(now, clock);
        };
        smp::set_pause(true);
        while !smp::is_paused() {
            tell(clock);
        }
        let mut errors = 0;
        for index in 0..working + cold {
            errors += count(match index.checked_sub(working) {
                None => memory.compare(index),
                Some(index) => memory.compare_cold(index),
            });
            tell(clock);
        }
        smp::set_pause(false);
        let took_us = self.frequency.us(clock.read().saturating_sub(start));
        console.say(&CheckedAll { pages: working + cold, errors, took_us }, clock);
    }

    /// Compares cold pages chosen pseudo-randomly, never the same choice twice in a row.
    fn touch_cold(&mut self, wanted: u64) {
        let Self { memory, console, clock, .. } = self;
        let cold = memory.layout.cold.pages();
        let pages = if cold == 0 { 0 } else { wanted };
        let start = clock.read();
        let (mut errors, mut longest) = (0, 0);
        for _ in 0..pages {
            let before = clock.read();
            errors += count(memory.compare_cold(self.random.below(cold)));
            let now = clock.read();
            longest = longest.max(now.saturating_sub(before));
            console.tell(now, clock);
        }
        let took_us = self.frequency.us(clock.read().saturating_sub(start));
        console.say(&Touched { pages, errors, took_us, longest_us: self.frequency.us(longest) }, clock);
    }
}

/// Counts a page that was compared, and a bad one among the errors: 1 or 0.
fn count(compared: Result<(), Bad>) -> u64 {
    Figures::count(&FIGURES[0].checked);
    match compared {
        Ok(()) => 0,
        Err(bad) => {
            FIGURES[0].found(&bad);
            1
        }
    }
}

fn reset_stall() {
    FIGURES.iter().for_each(|figures| figures.longest_stall.store(0, Relaxed));
}
