//! The console: reports ten times a second, commands, answers.

use core::fmt;
use core::sync::atomic::Ordering::Relaxed;

use crate::clock::Clock;
use crate::command::{Command, UnknownCommand};
use crate::control::{self, FIGURES, ORDERS};
use crate::report::{Ack, Error, Report, State};
use crate::serial::Serial;
use crate::tsc::Frequency;
use crate::{entry, power};

const REPORT_US: u64 = 100_000;
/// How often input is looked for: each look is an exit to the host.
const POLL_BUSY_US: u64 = 100_000;
const POLL_IDLE_US: u64 = 10_000;
/// How long a port that takes no bytes is left alone.
const PATIENCE_US: u64 = 1000;

/// The console, which belongs to the first vCPU.
pub struct Console {
    serial: Serial,
    frequency: Frequency,
    line: [u8; 128],
    line_len: usize,
    next_report: u64,
    last_poll: u64,
    told: [u32; 2],
}

impl Console {
    pub fn new(frequency: Frequency) -> Self {
        Self {
            serial: Serial::new(),
            frequency,
            line: [0; 128],
            line_len: 0,
            next_report: 0,
            last_poll: 0,
            told: [0; 2],
        }
    }

    /// Queues a line that must not get lost: waits for room.
    pub fn say(&mut self, line: &dyn fmt::Display, clock: &mut Clock) {
        while !self.serial.queue(line) {
            self.pump(clock);
        }
    }

    /// Queues a line if there is room; whether there was.
    pub fn offer(&mut self, line: &dyn fmt::Display) -> bool {
        self.serial.queue(line)
    }

    /// Says why something is not done.
    pub fn refuse(&mut self, message: &dyn fmt::Display, clock: &mut Clock) {
        self.say(&Error { message }, clock);
    }

    /// Sends everything that is queued.
    pub fn flush(&mut self, clock: &mut Clock) {
        while !self.serial.is_empty() {
            self.pump(clock);
        }
    }

    /// Whether there is output to send.
    pub fn has_output(&self) -> bool {
        !self.serial.is_empty()
    }

    fn pump(&mut self, clock: &mut Clock) {
        if control::silenced() {
            loop {
                core::hint::spin_loop();
            }
        }
        self.serial.pump(clock, self.frequency.ticks(PATIENCE_US));
    }

    /// What is due at `now` of the output: a report, news of bad pages, the next few bytes. Whether a report was due.
    #[inline]
    pub fn tell(&mut self, now: u64, clock: &mut Clock) -> bool {
        let is_due = now >= self.next_report;
        if is_due {
            self.report(now);
        }
        if self.has_output() {
            self.pump(clock);
        }
        is_due
    }

    fn report(&mut self, now: u64) {
        // From now and not from when it was due: after a stall there is one report, not all those that were missed.
        self.next_report = now + self.frequency.ticks(REPORT_US);
        for (figures, told) in FIGURES.iter().zip(&mut self.told) {
            while let Some(bad) = figures.bad(*told) {
                if !self.serial.queue(&bad) {
                    return;
                }
                *told += 1;
            }
        }
        let longest = FIGURES.iter().map(|figures| figures.longest_stall.load(Relaxed)).max();
        let running = ORDERS.running.load(Relaxed);
        let report = Report {
            state: if running { State::Running } else { State::Stopped },
            iterations: control::sum(|figures| &figures.iterations),
            checked: control::sum(|figures| &figures.checked),
            errors: control::sum(|figures| &figures.errors),
            longest_stall_us: self.frequency.us(longest.unwrap_or_default()),
            now_us: self.frequency.us(now.saturating_sub(entry::boot_tsc())),
        };
        // One that finds no room is left out: the next will say more.
        self.serial.queue(&report);
    }

    /// The next command, if input is due to be looked at and there is one. `idle` looks more often.
    #[inline]
    pub fn command(&mut self, now: u64, idle: bool, clock: &mut Clock) -> Option<Command> {
        let every = if idle { POLL_IDLE_US } else { POLL_BUSY_US };
        if now.wrapping_sub(self.last_poll) < self.frequency.ticks(every) && !self.serial.has_input {
            return None;
        }
        self.last_poll = now;
        while let Some(byte) = self.serial.read(clock) {
            if !matches!(byte, b'\n' | b'\r') {
                if let Some(slot) = self.line.get_mut(self.line_len) {
                    *slot = byte;
                }
                // One too long keeps counting, and is then no command.
                self.line_len = self.line_len.saturating_add(1);
            } else if self.line_len > 0 {
                let line = self.line;
                let text = line.get(..self.line_len).and_then(|line| str::from_utf8(line).ok()).unwrap_or_default();
                self.line_len = 0;
                match text.parse::<Command>() {
                    Ok(command) => {
                        self.say(&Ack { command }, clock);
                        return Some(command);
                    }
                    Err(UnknownCommand) => self.say(&Error { message: UnknownCommand }, clock),
                }
            }
        }
        None
    }

    /// Ends with an error.
    pub fn fail(&mut self, message: &dyn fmt::Display, clock: &mut Clock) -> ! {
        self.say(&Error { message }, clock);
        self.flush(clock);
        power::off()
    }
}
